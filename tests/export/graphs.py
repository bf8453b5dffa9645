"""Exported files of a few weights, written node by node: no export is needed to quantise, wrap or measure one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from visionattn.export.spec import ExportSpec


class Facts(nn.Module):
    """What a model states of itself."""

    def __init__(self, size: int = 32, **facts: object) -> None:
        super().__init__()
        self.num_classes = 0
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}
        if facts.get("task") != "classify":
            self.pretrained_cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        for name, value in facts.items():
            setattr(self, name, value)


def write(path: Path, nodes: list, weights: dict[str, np.ndarray], facts: Facts, out: list) -> Path:
    """Write a graph with the metadata of an export; `out` is the shape of its output."""
    spec = ExportSpec.of(facts, None, True, 20, "drawn", None)
    axes = ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in spec.input_names],
        [helper.make_tensor_value_info(spec.output_names[0], TensorProto.FLOAT, out)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(model, spec.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def upscaler(path: Path, awkward: bool = False) -> Path:
    """Doubles a picture by repeating its pixels, through three convolutions.

    An awkward one carries its picture beside a channel a thousand times as loud, which is then left out.
    """
    rng = np.random.default_rng(0)
    first = np.zeros((8, 3, 3, 3))
    first[:3, :, 1, 1] = np.eye(3)
    second = np.zeros((8, 8, 1, 1))
    second[:3, :3, 0, 0] = np.eye(3)
    first[3:] = rng.random((5, 3, 3, 3)) / 27
    loudness = np.array([1, 1, 1, *[1000 if awkward else 1] * 5])[:, None, None]
    last = np.zeros((12, 8, 1, 1))
    for channel in range(3):
        last[4 * channel : 4 * channel + 4, channel] = 1
    weights = {"body.weight": first, "loudness": loudness, "mix.weight": second, "last.weight": last}
    nodes = [
        helper.make_node("Conv", ["image", "body.weight"], ["a"], "node_body", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["a", "loudness"], ["loud"], "node_mul"),
        helper.make_node("Conv", ["loud", "mix.weight"], ["b"], "node_mix"),
        helper.make_node("Conv", ["b", "last.weight"], ["c"], "node_last"),
        helper.make_node("DepthToSpace", ["c"], ["upscaled"], "node_shuffle", blocksize=2, mode="CRD"),
    ]
    facts = Facts(16, task="restore", scale=2, radius=1, output_names=("upscaled",))
    return write(path, nodes, weights, facts, ["batch", 3, "h", "w"])


def matcher(path: Path) -> Path:
    """The disparity of a view is 20 times its red, as in `tests.predict.matchers.Stereo`."""
    weights = {"red.weight": 20 * np.eye(1, 3).reshape(1, 3, 1, 1)}
    nodes = [
        helper.make_node("Conv", [name, "red.weight"], [f"{name}_d"], f"node_{name}") for name in ("left", "right")
    ]
    nodes.append(helper.make_node("Concat", ["left_d", "right_d"], ["disparity"], "node_both", axis=1))
    facts = Facts(16, task="stereo", input_names=("left", "right"), output_names=("disparity",), size_minimum=4)
    facts.pretrained_cfg["architecture"] = "va_match_stereo_nano"
    return write(path, nodes, weights, facts, ["batch", 2, "height", "width"])


def classifier(path: Path, classes: int = 4) -> Path:
    """Patches of 8 x 8 pixels through a product with weights; without classes, its mean over the patches."""
    rng = np.random.default_rng(0)
    width = classes or 16
    weights = {
        "patch.weight": rng.normal(size=(24, 3, 8, 8)) / 14,
        "head.weight": rng.normal(size=(24, 256)) / 5,
        "out.weight": rng.normal(size=(256, width)) / 16,
    }
    output = "logits" if classes else "features"
    nodes = [
        helper.make_node("Conv", ["image", "patch.weight"], ["a"], "node_patch", strides=[8, 8]),
        helper.make_node("Transpose", ["a"], ["b"], "node_last", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["b", "head.weight"], ["c"], "node_head"),
        helper.make_node("Tanh", ["c"], ["d"], "node_tanh"),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], "node_mean", keepdims=0),
        helper.make_node("MatMul", ["e", "out.weight"], [output], "node_out"),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["axes"], "node_axes", value_ints=[1, 2]))
    return write(path, nodes, weights, Facts(32, task="classify", num_classes=classes), ["batch", width])
