from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from tests.export import graphs
from visionattn.errors import ExportError
from visionattn.export.examples import load_examples
from visionattn.export.quality import Runner
from visionattn.export.quantize import quantize
from visionattn.export.runtime import OnnxModel


def quantized(source, folder, lines=None):
    spec = OnnxModel(source).spec
    return quantize(source, spec, load_examples(spec, None)[:4], folder, (lines if lines is not None else []).append)


def test_convolutions_get_unsigned_activations_and_signed_weights_per_channel(tmp_path):
    made = quantized(graphs.upscaler(tmp_path / "toy.onnx"), tmp_path)
    assert made.kept == ()
    assert made.quality.metric == "PSNR-Y in dB"
    assert made.quality.loss < 0.03
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.model.graph.initializer}
    pairs = [node for node in made.model.graph.node if node.op_type == "DequantizeLinear"]
    weights = [node for node in pairs if node.input[0] in constants]
    assert len(weights) == 3
    for node in weights:
        stored = constants[node.input[0]]
        assert stored.dtype == np.int8
        assert constants[node.input[1]].shape == (len(stored),)  # a scale a channel
        assert not constants[node.input[2]].any()
    activations = [node for node in pairs if node.input[0] not in constants]
    assert activations
    assert {constants[node.input[2]].dtype.name for node in activations} == {"uint8"}


def test_what_costs_too_much_stays_in_float(tmp_path):
    lines: list[str] = []
    made = quantized(graphs.upscaler(tmp_path / "toy.onnx", awkward=True), tmp_path, lines)
    # The picture beside a channel a thousand times as loud has no more than a level or two of 256.
    assert made.kept == ("mix.weight",)
    assert made.quality.loss <= made.quality.allowed / 2
    assert lines[0].startswith("Int8 with 0 of 3 nodes in float: PSNR-Y")
    assert lines[-1].startswith("Int8 with 1 of 3 nodes in float: PSNR-Y")
    quantised = [node for node in made.model.graph.node if node.op_type == "Conv" and "mix.weight" in node.input]
    assert len(quantised) == 1  # its weight is the float one


def test_in_stereo_layers_that_read_a_concatenation_stay_in_float(tmp_path):
    make = onnx.helper.make_node
    weights = {
        "alone.weight": 20 * np.eye(1, 3).reshape(1, 3, 1, 1),
        "joined.weight": np.eye(1, 6).reshape(1, 6, 1, 1),
    }
    nodes = [
        make("Conv", ["left", "alone.weight"], ["found"], "node_alone"),
        make("Concat", ["left", "right"], ["both"], "node_both", axis=1),
        make("Conv", ["both", "joined.weight"], ["joined"], "node_joined"),
        make("Sum", ["found", "joined"], ["disparity"], "node_sum"),
    ]
    facts = graphs.Facts(16, task="stereo", input_names=("left", "right"), output_names=("disparity",), size_minimum=4)
    source = graphs.write(tmp_path / "toy.onnx", nodes, weights, facts, ["batch", 1, "height", "width"])
    made = quantized(source, tmp_path)
    inputs = {node.name: node.input for node in made.model.graph.node}
    assert inputs["node_joined"][1] == "joined.weight"
    assert inputs["node_alone"][1] == "alone.weight_DequantizeLinear_Output"


def test_products_with_weights_get_the_ranges_of_each_input(tmp_path):
    source = graphs.classifier(tmp_path / "toy.onnx", classes=0)
    made = quantized(source, tmp_path)
    kinds = Counter(node.op_type for node in made.model.graph.node)
    assert (kinds["MatMulInteger"], kinds["MatMul"], kinds["Conv"]) == (2, 0, 1)
    assert made.quality.metric == "cosine with float32"
    assert 0 < made.quality.loss < 1e-4
    # Another range than that of the calibration: products follow it.
    spec = OnnxModel(source).spec
    dark = {"image": np.full((1, 3, 32, 32), -1.9, np.float32)}
    path = tmp_path / "made.onnx"
    onnx.save(made.model, path)
    np.testing.assert_allclose(Runner(path, spec).run(dark), Runner(source, spec).run(dark), atol=0.05)


def test_nothing_to_quantise(tmp_path):
    node = onnx.helper.make_node("ReduceMean", ["image", "axes"], ["features"], "node_mean", keepdims=0)
    axes = onnx.helper.make_node("Constant", [], ["axes"], "node_axes", value_ints=[2, 3])
    source = graphs.write(tmp_path / "toy.onnx", [axes, node], {}, graphs.Facts(task="classify"), ["batch", 3])
    with pytest.raises(ExportError, match="no convolutions: there is nothing to compute in int8"):
        quantized(source, tmp_path)
