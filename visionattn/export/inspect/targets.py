"""Operators of a file that are supported on phones and in browsers, according to their runtimes' own tables.

Phones: ONNX Runtime's usability checker, by type of operator and by whether shapes are fixed. Each switch between
accelerator and CPU costs time; the best case is one partition with all nodes. Browsers: WASM has the operators of the
CPU; WebGPU and WebNN have fewer, and WebNN only takes fixed shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visionattn.errors import require, shorten

__all__ = ["Target", "find_targets"]

# Tables of ONNX Runtime Web (version in the file): names of operators, separated by spaces.
WEB_OPERATORS = json.loads(Path(__file__).with_name("web_operators.json").read_text())
_REASON = 200


@dataclass(frozen=True)
class Target:
    """Support of a file by one runtime, after ONNX Runtime's basic optimisation.

    Attributes:
        name: The runtime.
        nodes: Number of operators in the graph.
        supported: Number of supported operators.
        partitions: Number of contiguous groups of supported operators; the CPU computes the rest.
        unsupported: Types of unsupported operators.
        dynamic: Number of operators that would be supported with fixed shapes.
        fault: Why support could not be determined; empty otherwise.
    """

    name: str
    nodes: int = 0
    supported: int = 0
    partitions: int = 0
    unsupported: tuple[str, ...] = ()
    dynamic: int = 0
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"{self.name}: unknown, {self.fault}"
        text = f"{self.name}: {self.supported} of {self.nodes} nodes"
        if self.partitions:
            text += f" in {self.partitions} partition{'s' * (self.partitions > 1)}"
        if self.dynamic:
            text += f"; {self.dynamic} more with fixed shapes (--batch 1 --static-size)"
        if self.unsupported:
            shown = ", ".join(self.unsupported[:8]) + (", ..." if len(self.unsupported) > 8 else "")
            text += f"; unsupported: {shown}"
        return text


def find_targets(path: Path, loads: bool) -> list[Target]:
    """Determine the operators of a file that each runtime supports.

    Args:
        path: The file.
        loads: Whether it runs on the CPU, and therefore in WASM.
    """
    names = ("NNAPI", "Core ML NeuralNetwork", "Core ML MLProgram", "WASM", "WebGPU", "WebNN")
    checker: Any = require("onnxruntime.tools.mobile_helpers.usability_checker", "export")
    tools: Any = require("onnxruntime.tools.onnx_model_utils", "export")
    runtime: Any = require("onnxruntime", "export")
    runtime.set_default_logger_severity(4)  # errors are raised as well
    try:
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "model.onnx"
            tools.optimize_model(path.resolve(), optimised, use_external_initializers=True)
            model = tools.ModelProtoWithShapeInfo(optimised).model_with_shape_info
            coreml = checker.check_coreml_partitions
            phones: dict[str, Callable[..., Any]] = {
                "NNAPI": checker.check_nnapi_partitions,
                "Core ML NeuralNetwork": partial(coreml, config_filename="coreml_supported_neuralnetwork_ops.md"),
                "Core ML MLProgram": partial(coreml, config_filename="coreml_supported_mlprogram_ops.md"),
            }
            found = [_on_phone(name, model, check) for name, check in phones.items()]
    # The tools raise any exception of ONNX, its shape inference and ONNX Runtime.
    except Exception as error:
        return [Target(name, fault=shorten(error, _REASON)) for name in names]
    finally:
        runtime.set_default_logger_severity(2)
    kinds = [
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in model.graph.node
    ]
    wasm = Target("WASM", len(kinds), len(kinds)) if loads else Target("WASM", fault="it did not run on the CPU")
    browsers = [_in_browser(name, kinds, set(WEB_OPERATORS[name].split())) for name in ("WebGPU", "WebNN")]
    return [*found, wasm, *browsers]


def _on_phone(name: str, model: Any, check: Callable[..., Any]) -> Target:
    fixed, any_shape = check(model, require_fixed_input_sizes=True), check(model, require_fixed_input_sizes=False)
    unsupported = {kind.removeprefix("ai.onnx:") for kind in any_shape.unsupported_ops | fixed.unsupported_ops}
    unsupported |= {f"{kind.removeprefix('ai.onnx:')} of this rank" for kind in fixed.ops_with_unsupported_rank}
    more = max(any_shape.num_supported_nodes - fixed.num_supported_nodes, 0)
    return Target(
        name, fixed.num_nodes, fixed.num_supported_nodes, fixed.num_partitions, tuple(sorted(unsupported)), more
    )


def _in_browser(name: str, kinds: list[str], known: set[str]) -> Target:
    unsupported = tuple(sorted(set(kinds) - known))
    return Target(name, len(kinds), sum(kind in known for kind in kinds), unsupported=unsupported)
