"""Compare a file, also of another tool, with the PyTorch model that it was exported from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from visionattn.errors import ExportError, InputError, require
from visionattn.export.check import TOLERANCE, CheckRow, check_onnx
from visionattn.export.inspect.structure import Structure
from visionattn.export.spec import ExportSpec

__all__ = ["compare"]

# Absolute and relative tolerances (see `TOLERANCE`); the effect of fp16 and int8 on metrics is measured at export.
TOLERANCES = {"fp32": TOLERANCE, "fp16": (1e-3, 2e-2), "int8": (1e-2, 0.25)}


def compare(
    path: Path,
    structure: Structure,
    spec: ExportSpec | None,
    model: nn.Module,
    size: tuple[int, int],
    progress: Callable[[str], None],
) -> tuple[list[CheckRow], str]:
    """Compare a file with a model (see `check_onnx`).

    Args:
        path: The file.
        structure: Its structure.
        spec: Its metadata; None if it has none, then the model's are used.
        model: The model.
        size: Height and width, for a file without metadata.
        progress: Called with lines about the progress.

    Returns:
        The rows if all passed, and otherwise a message about those that did not.

    Raises:
        InputError: The model fails at a size that the file takes, or has other inputs.
    """
    if spec is not None and spec.input_type == "uint8":
        raise InputError("The file includes preprocessing: compare the float32 file that it was made from.")
    with tempfile.TemporaryDirectory() as folder:
        if spec is None:
            path = _with_metadata(path, structure, model, size, Path(folder) / "model.onnx")
        try:
            tolerance = TOLERANCES[_precision(structure, spec)]
            return check_onnx(model, path, tolerance=tolerance, progress=progress), ""
        except ExportError as error:
            return [], str(error)


def _precision(structure: Structure, spec: ExportSpec | None) -> str:
    if spec is not None and spec.precision in TOLERANCES:
        return spec.precision
    if any("Quant" in kind or "Integer" in kind for kind in structure.operators):
        return "int8"
    return "fp16" if any(value.type == "float16" for value in structure.inputs) else "fp32"


def _with_metadata(path: Path, structure: Structure, model: nn.Module, size: tuple[int, int], copy: Path) -> Path:
    """A copy of a file of another tool, with the model's metadata."""
    onnx = require("onnx", "export")
    shape = structure.inputs[0].shape or []
    dynamic = any(isinstance(side, str) for side in shape[2:])
    batch = shape[0] if shape and isinstance(shape[0], int) else None
    spec = ExportSpec.of(model, size, dynamic, structure.opsets.get("", 0), "not stated", None, batch)
    metadata = spec.to_metadata() | {
        "input_names": json.dumps([value.name for value in structure.inputs]),
        "output_names": json.dumps([value.name for value in structure.outputs]),
    }
    file = onnx.load(path)
    onnx.helper.set_model_props(file, metadata)
    onnx.save(file, copy)
    return copy
