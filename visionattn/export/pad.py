"""Channels of convolutions padded with zero weights to a multiple of 4, for which ONNX Runtime has faster kernels.

The result is the same: a padded channel holds finite values, which the next convolution multiplies by zero. Padding
goes through element-wise operators and concatenations. Where another operator reads the channels, they stay as they
are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import InputError, require

__all__ = ["pad_channels", "pad_file"]

MULTIPLE = 4
LEAST = 8  # padding fewer channels would cost more than a quarter
# Finite for zero inputs, whichever constants they have.
_ELEMENTWISE = {"Add", "Clip", "Identity", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"}

Parts = tuple[tuple[int, int], ...]  # own and padded number of channels of each concatenated part


def pad_channels(model: Any) -> Any:
    """Pad the channels of a graph's convolutions.

    Args:
        model: An `onnx.ModelProto` with maps (B, C, H, W); not changed.

    Raises:
        InputError: There is nothing to pad.
    """
    padded = require("onnx", "export").ModelProto()
    padded.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in padded.graph.initializer}
    layouts = _layouts(padded.graph, weights)
    if all(own == wide for parts in layouts.values() for own, wide in parts):
        raise InputError(
            f"There are no channels to pad: all widths are divisible by {MULTIPLE}, or other operators than "
            "convolutions read them. Leave out --pad-channels (pad_channels=)."
        )
    for node in padded.graph.node:
        if _pads(node, weights):
            _pad_convolution(node, weights, layouts)
    for value in padded.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.name in layouts:
            dims[1].dim_value = sum(wide for _, wide in layouts[value.name])
        elif value.name in weights:
            for dim, size in zip(dims, weights[value.name].dims):
                dim.dim_value = size
    return padded


def pad_file(path: str | Path) -> None:
    """Apply `pad_channels` to a file, in place."""
    onnx = require("onnx", "export")
    onnx.save(pad_channels(onnx.load(path)), path)


def _pads(node: Any, weights: dict[str, Any]) -> bool:
    """Whether a node is a dense convolution with stored weights."""
    groups = [attribute.i for attribute in node.attribute if attribute.name == "group"]
    return node.op_type == "Conv" and groups in ([], [1]) and all(name in weights for name in node.input[1:] if name)


def _joins(node: Any) -> bool:
    return node.op_type == "Concat" and any(a.name == "axis" and a.i == 1 for a in node.attribute)


def _maps(graph: Any, weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors whose second axis is made of channels of convolutions: name -> channels of each concatenated part."""
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            return {}  # a subgraph may read any tensor
        constants = [weights[name] for name in node.input if name in weights]
        read = [found.get(name) for name in node.input if name and name not in weights]
        parts: tuple[int, ...] | None = None
        if _pads(node, weights):
            parts = (weights[node.input[1]].dims[0],)
        elif not read or None in read:
            continue
        elif _joins(node) and not constants:
            parts = tuple(part for each in read for part in each or ())
        # A constant with channels of its own would have to be padded too.
        elif node.op_type in _ELEMENTWISE and len(set(read)) == 1 and all(np.prod(c.dims) == 1 for c in constants):
            parts = read[0]
        if parts is not None:
            found.update(dict.fromkeys(node.output, parts))
    return found


def _layouts(graph: Any, weights: dict[str, Any]) -> dict[str, Parts]:
    """The parts of each map."""
    maps = _maps(graph, weights)
    fixed = _read_by_others(graph, weights, maps)
    while True:
        layouts: dict[str, Parts] = {}
        before = len(fixed)
        for node in graph.node:
            if not maps.keys() >= set(node.output):
                continue
            if _pads(node, weights):
                own = weights[node.input[1]].dims[0]
                wide = own if own < LEAST or not fixed.isdisjoint(node.output) else -(-own // MULTIPLE) * MULTIPLE
                parts: Parts = ((own, wide),)
            else:
                read = [layouts[name] for name in node.input if name in maps]
                parts = tuple(part for each in read for part in each) if _joins(node) else read[0]
                differ = not _joins(node) and len(set(read)) > 1
                if differ or not fixed.isdisjoint(node.output):
                    fixed.update(name for name in [*node.input, *node.output] if name in maps)
            layouts.update(dict.fromkeys(node.output, parts))
        if len(fixed) == before:
            return layouts


def _read_by_others(graph: Any, weights: dict[str, Any], maps: dict[str, Any]) -> set[str]:
    """Maps that keep their channels, since an output or another operator than convolutions needs them."""
    fixed = {value.name for value in graph.output}
    readers = Counter(name for node in graph.node for name in set(node.input))
    for node in graph.node:
        if _pads(node, weights):
            if any(readers[name] > 1 for name in node.input[1:] if name):
                fixed.update([node.input[0], *node.output])  # weights of several convolutions
        elif not maps.keys() >= set(node.output):
            fixed.update(node.input)
    return fixed & maps.keys()


def _pad_convolution(node: Any, weights: dict[str, Any], layouts: dict[str, Parts]) -> None:
    numpy_helper = require("onnx", "export").numpy_helper
    ((own, wide),) = layouts[node.output[0]]
    kernel = numpy_helper.to_array(weights[node.input[1]])
    inputs = layouts.get(node.input[0], ((kernel.shape[1],) * 2,))

    def store(name: str, value: np.ndarray) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(value, name))

    store(node.input[1], _widen(_widen(kernel, inputs, 1), ((own, wide),), 0))
    if len(node.input) > 2 and node.input[2]:
        store(node.input[2], _widen(numpy_helper.to_array(weights[node.input[2]]), ((own, wide),), 0))


def _widen(array: np.ndarray, parts: Parts, axis: int) -> np.ndarray:
    """Append zeros to each part of an axis."""
    ends = np.cumsum([own for own, _ in parts])[:-1]
    pieces = []
    for piece, (own, wide) in zip(np.split(array, ends, axis), parts):
        amounts = [(0, 0)] * array.ndim
        amounts[axis] = (0, wide - own)
        pieces.append(np.pad(piece, amounts))
    return np.concatenate(pieces, axis)
