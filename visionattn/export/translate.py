"""Files of a traced model with their metadata: translated to ONNX, or as a program of torch.export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from visionattn.errors import ExportError, require
from visionattn.export.budget import Budget
from visionattn.export.matching import first_node_first
from visionattn.export.spec import ExportSpec
from visionattn.export.trace import refusal

__all__ = ["save_program", "translate"]


def translate(program: ExportedProgram, spec: ExportSpec, path: Path, budget: Budget) -> int:
    """Translate to ONNX, and write the file with its metadata.

    Args:
        program: The traced model, without operators of this package.
        spec: The metadata.
        path: File to write.
        budget: The time limit.

    Returns:
        The number of nodes.

    Raises:
        ExportError: The exporter fails, or the time does not suffice.
    """
    onnx = require("onnx", "export")
    clear = require("onnx_ir.passes.common", "export").ClearMetadataAndDocStringPass()
    try:
        with warnings.catch_warnings(), first_node_first(budget):
            # Two inputs share their axes, which makes the exporter warn once per axis.
            warnings.filterwarnings("ignore", message="# The axis name")
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=spec.opset,
                input_names=spec.input_names,
                output_names=spec.output_names,
                dynamic_shapes=tuple(spec.axes),
                verbose=False,
            )
    # The exporter wraps whatever its translation functions raise.
    except Exception as error:
        raise refusal("The ONNX exporter", spec, error) from error
    model = translated.model
    if model.opset_imports[""] != spec.opset:
        raise ExportError(
            f"The exporter wrote operator set {model.opset_imports['']} instead of the requested {spec.opset}: leave "
            "out --opset (opset=)."
        )
    # The exporter stores the stack trace of every node: local paths, and a third of a small file.
    clear(model)
    # The exporter writes its newest IR version, which older runtimes reject whatever the file contains.
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", spec.opset)])
    model.metadata_props.update(spec.to_metadata())
    translated.save(str(path), external_data=False)
    return len(model.graph)


def save_program(program: ExportedProgram, spec: ExportSpec, path: Path) -> nn.Module:
    """Write a program of torch.export, with its metadata as JSON in the embedded file `visionattn.json`.

    Returns:
        The program that was written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the age of the format
        torch.export.save(program, path, extra_files={"visionattn.json": json.dumps(spec.to_metadata())})
        return torch.export.load(path).module()
