"""Small graphs of no model of this package, as another tool may have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write(path: Path, nodes: list[Any], weights: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A graph from `image` to `result`.

    Settings: `shape` of the image, `type` of its elements, `inputs` beside it, `domain` of a second operator set.
    """
    shape = settings.get("shape", ["n", 3, "h", "w"])
    kind = settings.get("type", TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info("image", kind, shape), *settings.get("inputs", [])]
    output = helper.make_tensor_value_info(
        "result", settings.get("gives", kind), settings.get("result", [None] * len(shape))
    )
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", 17)]
    opsets += [helper.make_opsetid(settings["domain"], 1)] if "domain" in settings else []
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="other"), path)
    return path


def convolution(path: Path, weight: np.ndarray | None = None, **settings: Any) -> Path:
    """One 3 x 3 convolution of three channels to two."""
    weight = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32) if weight is None else weight
    node = helper.make_node("Conv", ["image", "weight"], ["result"], pads=[1] * 4)
    return write(path, [node], {"weight": weight}, **settings)


def in_steps_of_8(path: Path) -> Path:
    """Halves sides three times by a reshape that fits multiples of 8 alone, and says nothing of it."""
    node = helper.make_node("SpaceToDepth", ["image"], ["result"], blocksize=8)
    return write(path, [node])


def mixes_its_batch(path: Path) -> Path:
    """Subtracts the mean of the batch."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[0]),
        helper.make_node("Mul", ["mean", "half"], ["part"]),
        helper.make_node("Sub", ["image", "part"], ["result"]),
    ]
    return write(path, nodes, {"half": np.float32(0.5)})


def without_image(path: Path) -> Path:
    """Adds two vectors."""
    return write(path, [helper.make_node("Add", ["image", "image"], ["result"])], shape=["n", 5])
