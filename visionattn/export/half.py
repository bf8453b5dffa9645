"""Float16: half the size. Inputs and outputs, and operators that are not suited to float16, stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionattn.errors import ExportError, require, shorten

__all__ = ["to_half"]


def to_half(source: str | Path) -> Any:
    """Convert a float32 file to a float16 `onnx.ModelProto`.

    It uses ONNX Runtime's converter. The one of the same name in onnxconverter-common writes files that cannot be
    loaded if positions are computed in the graph, as in minimal ViTs of dynamic size and matching networks.

    Raises:
        ExportError: The file cannot be converted.
    """
    model = require("onnx", "export").load(source)
    convert = require("onnxruntime.transformers.float16", "export").convert_float_to_float16
    try:
        return convert(model, keep_io_types=True)
    # The converter does not validate the graph: any Python exception may occur.
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot convert the graph to float16: {shorten(error, 300)}") from error
