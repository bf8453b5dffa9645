"""Float16: half the size. Inputs and outputs, and operators that are not suited to float16, stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import ExportError, require, shorten

__all__ = ["halve_weights", "to_half"]

_LEAST = 256  # elements of a weight that is worth a cast


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


def halve_weights(model: Any) -> None:
    """Store the float32 weights of layers as float16; ONNX Runtime casts them back to float32 when it loads the file.

    Weights beyond the range of float16, or so small that they would lose more than its usual rounding, stay.

    Args:
        model: The graph, an `onnx.ModelProto`; changed.
    """
    onnx = require("onnx", "export")
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    weights = {node.input[1] for node in model.graph.node if node.op_type in layers}
    rounding = float(np.finfo(np.float16).eps)
    casts = []
    for tensor in model.graph.initializer:
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        if name not in weights or values.dtype != np.float32 or values.size < _LEAST:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.abs(half.astype(np.float32) - values).max() <= rounding * np.abs(values).max():
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
