from __future__ import annotations

import numpy as np
import onnx

from tests.export import graphs
from visionattn.export.half import to_half
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
