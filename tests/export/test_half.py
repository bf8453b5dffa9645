from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnxruntime

from tests.export import graphs
from visionattn.export.half import halve_weights, to_half
from visionattn.export.runtime import OnnxModel


def test_weights_are_halved_and_inputs_stay(tmp_path):
    source = graphs.classifier(tmp_path / "toy.onnx")
    model = to_half(source)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT16}
    path = tmp_path / "half.onnx"
    onnx.save(model, path)
    file = OnnxModel(path)
    assert file.session.get_inputs()[0].type == "tensor(float)"
    images = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    np.testing.assert_allclose(file(images)[0], OnnxModel(source)(images)[0], atol=2e-3)
    assert not np.array_equal(file(images)[0], OnnxModel(source)(images)[0])
    assert path.stat().st_size < 0.6 * source.stat().st_size


def test_weights_stored_as_float16_are_computed_in_float32(tmp_path):
    make, rng = onnx.helper.make_node, np.random.default_rng(0)
    weights = {
        "wide.weight": rng.standard_normal((3, 128)),
        "small.weight": rng.standard_normal((128, 1)),  # not worth a cast
        "huge.weight": np.full((1, 300), 1e5),  # beyond float16
        "tiny.weight": np.full((300, 2), 1e-8),  # would become 0
    }
    nodes = [
        make("MatMul", ["x", "wide.weight"], ["wide"]),
        make("MatMul", ["wide", "small.weight"], ["small"]),
        make("MatMul", ["small", "huge.weight"], ["huge"]),
        make("MatMul", ["huge", "tiny.weight"], ["y"]),
    ]
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    constants = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "toy", [value("x", shape=[2, 3])], [value("y", shape=[2, 2])], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    x = rng.standard_normal((2, 3)).astype(np.float32)
    weights["wide.weight"] = weights["wide.weight"].astype(np.float16)
    expected = x.astype(np.float64)
    for array in weights.values():
        expected = expected @ array

    halve_weights(model)

    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert stored == {"wide.weight_half": half, "small.weight": single, "huge.weight": single, "tiny.weight": single}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5)
