"""A file against the PyTorch model that it was made of, also where another tool wrote it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import nn

from visionattn.errors import ExportError, InputError, require
from visionattn.export.check import TOLERANCE, CheckRow, check_onnx
from visionattn.export.inspect.structure import Structure
from visionattn.export.spec import ExportSpec

__all__ = ["compare"]

# What half precision and int8 may lose of the spread of outputs; their export measures what it costs.
TOLERANCES = {"fp32": TOLERANCE, "fp16": (1e-3, 2e-2), "int8": (1e-2, 0.25)}


def compare(
    path: Path, structure: Structure, spec: ExportSpec | None, model: nn.Module, size: tuple[int, int]
) -> tuple[list[CheckRow], str]:
    """Compare a file with a model (see `check_onnx`).

    Args:
        path: The file.
        structure: Its structure.
        spec: Its metadata; None if it has none, then the model's are taken.
        model: The model.
        size: Height and width, for a file without metadata.

    Returns:
        Rows that passed, and what did not, in words; empty if all did.

    Raises:
        InputError: The model does not run at a size that the file takes, or has other inputs.
    """
    if spec is not None and spec.input_type == "uint8":
        raise InputError("The file prepares its images itself: compare the float32 file that it was made of.")
    with tempfile.TemporaryDirectory() as folder:
        if spec is None:
            path = _with_metadata(path, structure, model, size, Path(folder) / "model.onnx")
        try:
            return check_onnx(model, path, tolerance=TOLERANCES[_precision(structure, spec)]), ""
        except ExportError as error:
            return [], str(error)


def _precision(structure: Structure, spec: ExportSpec | None) -> str:
    if spec is not None and spec.precision in TOLERANCES:
        return spec.precision
    if any("Quant" in kind or "Integer" in kind for kind in structure.operators):
        return "int8"
    return "fp16" if any(value.type == "float16" for value in structure.inputs) else "fp32"


def _with_metadata(path: Path, structure: Structure, model: nn.Module, size: tuple[int, int], copy: Path) -> Path:
    """A copy of a foreign file that says about itself what the model does."""
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
