"""Float16: half the size. Inputs and outputs stay float32, and operators that float16 does not suit keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionattn.errors import ExportError, require, shorten

__all__ = ["to_half"]


def to_half(source: str | Path) -> Any:
    """A float32 file as an `onnx.ModelProto` of float16.

    onnxconverter-common's converter of the same name writes files that do not load where positions are computed in the
    graph, as in minimal ViTs of dynamic size and matching networks; this is ONNX Runtime's.

    Raises:
        ExportError: It cannot be converted.
    """
    model = require("onnx", "export").load(source)
    convert = require("onnxruntime.transformers.float16", "export").convert_float_to_float16
    try:
        return convert(model, keep_io_types=True)
    # The converter walks a graph that it did not make, and raises what Python raises.
    except Exception as error:
        raise ExportError(f"ONNX Runtime's converter to float16 refuses the graph: {shorten(error, 300)}") from error
