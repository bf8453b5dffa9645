"""Pre- and postprocessing inside the graph, by standard ONNX operators: from uint8 images (B, H, W, C) to results.

In:   x = (image (high - low) / 255 + low - mean) / std, then (B, C, H, W)
Out:  restore      uint8 (B, r H, r W, C), clipped and rounded half up      "image"
      classify     softmax over the classes                                 "probabilities"
      stereo       unchanged, in pixels                                     "disparity"
      without classes, unchanged                                            "features"
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from visionattn.errors import InputError, require
from visionattn.export.spec import ExportSpec

__all__ = ["output_kind", "with_preprocessing"]


def output_kind(spec: ExportSpec) -> str:
    """The kind of output of a graph with preprocessing."""
    if spec.task == "classify":
        return "probabilities" if spec.num_classes else "features"
    return {"restore": "image", "stereo": "disparity", "flow": "flow"}.get(spec.task, "features")


def with_preprocessing(model: Any, spec: ExportSpec) -> tuple[Any, ExportSpec]:
    """Add pre- and postprocessing to a graph.

    Args:
        model: An `onnx.ModelProto` of float32 inputs and outputs; not changed.
        spec: Its metadata.

    Returns:
        The extended graph and its metadata, which are not yet stored in it.

    Raises:
        InputError: Its inputs are already uint8.
    """
    if spec.input_type == "uint8":
        raise InputError(f"This file of {spec.model} already takes uint8 images: leave out --preprocess (preprocess=).")
    onnx = require("onnx", "export")
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    kind = output_kind(spec)
    before, after = _Nodes(onnx), _Nodes(onnx)
    _rename(graph, {name: f"preprocess.{name}.prepared" for name in spec.input_names})
    for value in graph.input:
        if value.name in spec.input_names:
            _prepare(before, value.name, spec)
            _to_nhwc(value.type.tensor_type, onnx.TensorProto.UINT8)
    if kind in ("image", "probabilities"):
        _rename(graph, {name: f"preprocess.{name}.raw" for name in spec.output_names})
        for value in graph.output:
            _finish(after, value.name, kind)
            if kind == "image":
                _to_nhwc(value.type.tensor_type, onnx.TensorProto.UINT8)
    inner = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before.nodes, *inner, *after.nodes])
    graph.initializer.extend([*before.constants, *after.constants])
    return wrapped, replace(spec, input_type="uint8", input_layout="NHWC", output_kind=kind)


class _Nodes:
    """Nodes and constants to add to a graph."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], f"{output}_{kind}", **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name


def _prepare(nodes: _Nodes, name: str, spec: ExportSpec) -> None:
    low, high = spec.input_range
    mean, std = (np.asarray(x, np.float64) for x in (spec.mean or [0.0], spec.std or [1.0]))
    scale = nodes.constant(f"preprocess.{name}.scale", (high - low) / 255 / std)
    shift = nodes.constant(f"preprocess.{name}.shift", (low - mean) / std)
    floats = nodes.add("Cast", [name], f"preprocess.{name}.floats", to=nodes.onnx.TensorProto.FLOAT)
    scaled = nodes.add("Mul", [floats, scale], f"preprocess.{name}.scaled")
    shifted = nodes.add("Add", [scaled, shift], f"preprocess.{name}.shifted")
    nodes.add("Transpose", [shifted], f"preprocess.{name}.prepared", perm=[0, 3, 1, 2])


def _finish(nodes: _Nodes, name: str, kind: str) -> None:
    raw = f"preprocess.{name}.raw"
    if kind == "probabilities":
        nodes.add("Softmax", [raw], name, axis=-1)
        return
    levels = nodes.add("Mul", [raw, nodes.constant(f"preprocess.{name}.levels", 255.0)], f"preprocess.{name}.scaled")
    above = nodes.add("Add", [levels, nodes.constant(f"preprocess.{name}.half", 0.5)], f"preprocess.{name}.above")
    bounds = [nodes.constant(f"preprocess.{name}.least", 0.0), nodes.constant(f"preprocess.{name}.most", 255.0)]
    clipped = nodes.add("Clip", [above, *bounds], f"preprocess.{name}.clipped")
    whole = nodes.add("Cast", [clipped], f"preprocess.{name}.uint8", to=nodes.onnx.TensorProto.UINT8)  # truncates
    nodes.add("Transpose", [whole], name, perm=[0, 2, 3, 1])


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Rename values in a graph and its subgraphs; inputs and outputs keep their names."""
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = names.get(name, name)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                _rename(inner, names)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)


def _to_nhwc(tensor: Any, element: int) -> None:
    tensor.elem_type = element
    dims = [type(dim).FromString(dim.SerializeToString()) for dim in tensor.shape.dim]
    for place, axis in enumerate((0, 2, 3, 1)):
        tensor.shape.dim[place].CopyFrom(dims[axis])
