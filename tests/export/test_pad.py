"""Channels padded to a multiple of 4: the same outputs, and channels that other operators need left alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from visionattn.errors import InputError
from visionattn.export import OnnxModel, export_onnx
from visionattn.export.api import export
from visionattn.export.pad import pad_channels
from visionattn.models.span import SPAN


def graph_of(nodes, weights, width):
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", width, "h", "w"])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def conv(source, weight, target, *bias, **settings):
    return helper.make_node("Conv", [source, weight, *bias], [target], f"node_{target}", **settings)


def drawn(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def run(model, image):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


def shapes(model):
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


IMAGE = np.random.default_rng(1).random((2, 3, 9, 7), np.float32)


def test_parts_of_a_concatenation_and_a_gate():
    """10 and 13 channels, one after the other, with 8 between them that need no padding."""
    weights = drawn(a=(10, 3, 3, 3), ab=(10,), b=(13, 10, 1, 1), bb=(13,), c=(8, 3, 1, 1), d=(5, 31, 1, 1), half=())
    nodes = [
        conv("image", "a", "x", "ab", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Sub", ["s", "half"], ["t"]),
        helper.make_node("Mul", ["x", "t"], ["gated"]),
        conv("gated", "b", "y", "bb"),
        conv("image", "c", "z"),
        helper.make_node("Concat", ["gated", "z", "y"], ["all"], axis=1),
        conv("all", "d", "out"),
    ]
    model = graph_of(nodes, weights, 5)
    padded = pad_channels(model)
    onnx.checker.check_model(padded, full_check=True)
    found = shapes(padded)
    assert (found["a"], found["ab"], found["b"], found["bb"]) == ([12, 3, 3, 3], [12], [16, 12, 1, 1], [16])
    assert (found["c"], found["d"]) == ([8, 3, 1, 1], [5, 36, 1, 1])  # the output keeps its channels
    expected = run(model, IMAGE)
    np.testing.assert_allclose(run(padded, IMAGE), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert shapes(model)["a"] == [10, 3, 3, 3]


@pytest.mark.parametrize(
    "between",
    [
        [helper.make_node("Mul", ["x", "each"], ["y"])],
        [helper.make_node("Softmax", ["x"], ["y"], axis=1)],
        [helper.make_node("Div", ["one", "x"], ["v"]), helper.make_node("Clip", ["v"], ["y"])],
        [conv("x", "spread", "y", group=2)],
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=2)],
        [conv("image", "one_map", "mask"), helper.make_node("Mul", ["x", "mask"], ["y"])],
    ],
    ids=["constant", "softmax", "division", "groups", "another_axis", "one_channel_for_all"],
)
def test_channels_that_others_read_stay(between):
    weights = drawn(
        a=(10, 3, 1, 1), b=(6, 10, 1, 1), each=(1, 10, 1, 1), spread=(10, 5, 1, 1), one=(), one_map=(1, 3, 1, 1)
    )
    nodes = [conv("image", "a", "x"), *between, conv("y", "b", "out")]
    model = graph_of(nodes, weights, 6)
    with pytest.raises(InputError, match=r"no channels to pad: .* Leave out --pad-channels"):
        pad_channels(model)


def test_one_branch_stays_and_the_other_is_padded():
    weights = drawn(a=(10, 3, 1, 1), b=(9, 3, 1, 1), c=(4, 19, 1, 1), each=(1, 10, 1, 1))
    nodes = [
        conv("image", "a", "x"),
        conv("image", "b", "y"),
        helper.make_node("Mul", ["x", "each"], ["scaled"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Relu", ["y"], ["positive"]),
        helper.make_node("Concat", ["same", "positive"], ["all"], axis=1),
        conv("all", "c", "last"),
        helper.make_node("Identity", ["last"], ["out"]),
    ]
    model = graph_of(nodes, weights, 4)
    padded = pad_channels(model)
    assert shapes(padded)["a"] == [10, 3, 1, 1]
    assert shapes(padded)["b"] == [12, 3, 1, 1]
    assert shapes(padded)["c"] == [4, 22, 1, 1]
    np.testing.assert_allclose(run(padded, IMAGE), run(model, IMAGE), rtol=0, atol=1e-5)


def test_equal_widths_of_different_parts():
    """Of two concatenations that are added, one has a part that stays: then so does its partner's."""
    weights = drawn(
        a=(10, 3, 1, 1), b=(10, 3, 1, 1), c=(4, 20, 1, 1), d=(9, 3, 1, 1), e=(4, 9, 1, 1), each=(1, 10, 1, 1)
    )
    nodes = [
        conv("image", "a", "x"),
        conv("image", "b", "y"),
        helper.make_node("Mul", ["x", "each"], ["scaled"]),
        helper.make_node("Concat", ["x", "y"], ["one"], axis=1),
        helper.make_node("Concat", ["y", "y"], ["two"], axis=1),
        helper.make_node("Add", ["one", "two"], ["sum"]),
        conv("sum", "c", "first"),
        conv("image", "d", "z"),
        conv("z", "e", "second"),
        helper.make_node("ReduceMean", ["scaled"], ["mean"]),
        helper.make_node("Add", ["first", "second"], ["both"]),
        helper.make_node("Add", ["both", "mean"], ["out"]),
    ]
    model = graph_of(nodes, weights, 4)
    padded = pad_channels(model)
    assert (shapes(padded)["a"][0], shapes(padded)["b"][0], shapes(padded)["d"][0]) == (10, 10, 12)
    np.testing.assert_allclose(run(padded, IMAGE), run(model, IMAGE), rtol=0, atol=1e-5)


def test_weights_of_two_convolutions_stay():
    weights = drawn(a=(10, 3, 1, 1), b=(10, 10, 1, 1), c=(4, 10, 1, 1))
    nodes = [conv("image", "a", "x"), conv("x", "b", "y"), conv("y", "b", "z"), conv("z", "c", "out")]
    with pytest.raises(InputError, match="no channels to pad"):
        pad_channels(graph_of(nodes, weights, 4))


@pytest.fixture(scope="module")
def span():
    torch.manual_seed(0)
    return SPAN(width=10, scale=2).eval()


def test_an_export(span, tmp_path):
    """Its check compares the padded file with PyTorch."""
    file = export_onnx(span, tmp_path / "span.onnx", pad_channels=True, input_size=(16, 20), dynamic_size=False)
    assert [row.batch for row in file.rows] == [1, 3]
    assert max(row.error / row.spread for row in file.rows) < 1e-5
    found = shapes(onnx.load(file.path))
    widths = {name: dims for name, dims in found.items() if name.endswith("weight")}
    assert widths["conv_1.conv.weight"] == [12, 3, 3, 3]
    assert widths["conv_cat.weight"] == [12, 48, 1, 1]
    assert widths["upsampler.weight"] == [12, 12, 3, 3]
    assert OnnxModel(file.path).spec == file.spec


def test_mistakes(span, tmp_path):
    with pytest.raises(InputError, match=r"pad_channels.* \.onnx or \.ort"):
        export(span, tmp_path / "span.pt2", pad_channels=True)
    assert list(tmp_path.iterdir()) == []
