"""Let an ONNX file read its weights from a file of the package, instead of containing them.

A tensor of a safetensors file is a range of bytes, as ONNX's external data are. Layers may need it with its axes in
another order: then the graph transposes it, once, when the file is loaded.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

LEAST = 256  # elements of a weight that is worth a reference
TYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def refer_to_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Replace weights of a graph by references to the same values in a safetensors file.

    Args:
        model: The graph; changed. It finds the file by its name, in the folder of its own file.
        weights: The file.

    Raises:
        ValueError: No weight of the graph is in the file.
    """
    stored = _tensors(weights)
    by_values: dict[bytes, list[tuple[np.ndarray, int]]] = {}
    for values, offset in stored:
        by_values.setdefault(_sorted(values), []).append((values, offset))
    tensors, nodes, found = [], [], False
    for tensor in model.graph.initializer:
        wanted = numpy_helper.to_array(tensor)
        large = wanted.dtype in TYPES.values() and wanted.size >= LEAST
        for values, offset in by_values.get(_sorted(wanted), ()) if large else ():
            order = _order(values, wanted)
            if order is None:
                continue
            found = True
            chain, extra = _layout(tensor.name, values, wanted, order)
            nodes += chain
            tensor = numpy_helper.from_array(values, chain[0].input[0] if chain else tensor.name)
            set_external_data(tensor, weights.name, offset, length=values.nbytes)
            tensor.ClearField("raw_data")
            tensors += extra
            break
        tensors.append(tensor)
    if not found:
        raise ValueError(f"No weight of the graph is in {weights}.")
    for field, values in ((model.graph.initializer, tensors), (model.graph.node, [*nodes, *model.graph.node])):
        # Deleting a field empties the messages in it.
        copied = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copied)


def _tensors(weights: Path) -> list[tuple[np.ndarray, int]]:
    """The tensors of a safetensors file, and where each begins."""
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found = []
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in TYPES:
            begin, end = (start + offset for offset in entry["data_offsets"])
            found.append((np.frombuffer(content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"]), begin))
    return found


def _sorted(values: np.ndarray) -> bytes:
    """The same for tensors that differ only in the order of their elements, or in their type."""
    return np.sort(values, axis=None).astype(np.float32).tobytes()


def _order(values: np.ndarray, wanted: np.ndarray) -> tuple[int, ...] | None:
    """The order of axes in which values have the elements of a wanted array, which may have another shape."""
    flat = wanted.ravel()
    orders = permutations(range(values.ndim))
    return next((order for order in orders if np.array_equal(values.transpose(order).ravel(), flat)), None)


def _layout(
    name: str, values: np.ndarray, wanted: np.ndarray, order: tuple[int, ...]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes that make a weight from the stored values, and the constants that they need."""
    steps: list[tuple[str, list[str], dict[str, object]]] = []
    constants = []
    if order != tuple(range(values.ndim)):
        steps.append(("Transpose", [], {"perm": order}))
    if values.transpose(order).shape != wanted.shape:
        constants.append(numpy_helper.from_array(np.array(wanted.shape, np.int64), f"{name}_shape"))
        steps.append(("Reshape", [f"{name}_shape"], {}))
    if values.dtype != wanted.dtype:
        steps.append(("Cast", [], {"to": helper.np_dtype_to_tensor_dtype(wanted.dtype)}))
    names = [f"{name}_{number}" for number in range(len(steps))] + [name]
    nodes = [
        helper.make_node(kind, [begin, *inputs], [end], **settings)
        for (kind, inputs, settings), begin, end in zip(steps, names, names[1:])
    ]
    return nodes, constants
