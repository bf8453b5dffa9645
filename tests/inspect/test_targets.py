"""Operators of a graph that are supported on phones and in browsers."""

import numpy as np
import pytest
from onnx import helper

import visionattn
from tests.inspect import graphs
from visionattn.export.inspect.targets import Target, find_targets

NAMES = ["NNAPI", "Core ML NeuralNetwork", "Core ML MLProgram", "WASM", "WebGPU", "WebNN"]


def test_fixed_and_dynamic_shapes(tmp_path):
    fixed = find_targets(graphs.convolution(tmp_path / "a.onnx", shape=[1, 3, 16, 16]), True)
    assert [target.name for target in fixed] == NAMES
    assert {(target.nodes, target.supported, target.dynamic) for target in fixed} == {(1, 1, 0)}
    assert {target.partitions for target in fixed[:3]} == {1}
    assert str(fixed[0]) == "NNAPI: 1 of 1 nodes in 1 partition"
    free = find_targets(graphs.convolution(tmp_path / "b.onnx"), True)
    assert {(target.supported, target.dynamic) for target in free[:3]} == {(0, 1)}
    assert str(free[0]) == "NNAPI: 0 of 1 nodes; 1 more with fixed shapes (--batch 1 --static-size)"


def test_operators_that_are_not_computed(tmp_path):
    nodes = [
        helper.make_node("Relu", ["image"], ["a"]),
        helper.make_node("Hardmax", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "two"], ["result"]),
    ]
    path = graphs.write(tmp_path / "a.onnx", nodes, {"two": np.float32(2)}, shape=[1, 3, 8, 8])
    found = {target.name: target for target in find_targets(path, True)}
    assert found["NNAPI"] == Target("NNAPI", 3, 2, 2, ("Hardmax",))
    assert found["WebGPU"] == Target("WebGPU", 3, 2, unsupported=("Hardmax",))
    assert found["WASM"] == Target("WASM", 3, 3)
    assert str(found["WebNN"]) == "WebNN: 2 of 3 nodes; unsupported: Hardmax"


def test_a_graph_that_does_not_load(tmp_path):
    twist = helper.make_node("Twist", ["image"], ["result"], domain="my.own")
    found = find_targets(graphs.write(tmp_path / "a.onnx", [twist], domain="my.own"), False)
    assert [target.name for target in found] == NAMES
    assert all("my.own" in target.fault and str(target).count("unknown") == 1 for target in found)


@pytest.mark.slow
def test_span_is_one_partition(tmp_path):
    visionattn.export("va_span_ch26_x4", tmp_path / "span.onnx", batch=1, static_size=True, check=False)
    found = find_targets(tmp_path / "span.onnx", True)
    assert {(target.nodes, target.supported, target.partitions) for target in found[:3]} == {(74, 74, 1)}
    assert {(target.nodes, target.supported) for target in found[3:]} == {(74, 74)}
