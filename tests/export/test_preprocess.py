from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.export import graphs
from visionattn.errors import InputError
from visionattn.export.preprocess import with_preprocessing
from visionattn.export.runtime import OnnxModel

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)


def wrapped(source):
    model, spec = with_preprocessing(onnx.load(source), OnnxModel(source).spec)
    onnx.helper.set_model_props(model, spec.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    path = source.with_suffix(".uint8.onnx")
    onnx.save(model, path)
    return OnnxModel(path)


def test_a_picture_comes_out(tmp_path):
    file = wrapped(graphs.upscaler(tmp_path / "toy.onnx"))
    assert (file.spec.input_type, file.spec.input_layout, file.spec.output_kind) == ("uint8", "NHWC", "image")
    (value,) = file.session.get_inputs()
    assert (value.type, value.shape) == ("tensor(uint8)", ["batch", "height", "width", 3])
    (result,) = file(PICTURES)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, PICTURES.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize(("value", "expected"), [(-0.1, 0), (0.4999 / 255, 0), (0.5001 / 255, 1), (1.7, 255)])
def test_results_are_clipped_and_rounded_half_up(value, expected, tmp_path):
    source = graphs.upscaler(tmp_path / "toy.onnx")
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    weights["last.weight"].CopyFrom(onnx.numpy_helper.from_array(np.zeros((12, 8, 1, 1), np.float32), "last.weight"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(12, value, np.float32), "bias"))
    next(node for node in model.graph.node if node.name == "node_last").input.append("bias")
    onnx.save(model, source)
    assert (wrapped(source)(PICTURES)[0] == expected).all()


def test_mean_and_deviation_are_inside_and_probabilities_come_out(tmp_path):
    source = graphs.classifier(tmp_path / "toy.onnx")
    file = wrapped(source)
    assert file.spec.output_kind == "probabilities"
    (probabilities,) = file(PICTURES)
    plain = OnnxModel(source)
    images = (PICTURES / 255 - np.array(plain.spec.mean)) / np.array(plain.spec.std)
    (logits,) = plain(images.transpose(0, 3, 1, 2).astype(np.float32))
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_features_stay(tmp_path):
    source = graphs.classifier(tmp_path / "toy.onnx", classes=0)
    file = wrapped(source)
    assert file.spec.output_kind == "features"
    assert file(PICTURES)[0].shape == (2, 16)


@pytest.mark.parametrize("images", [PICTURES.astype(np.float32), PICTURES.transpose(0, 3, 1, 2), PICTURES[0]])
def test_other_pictures_are_refused(images, tmp_path):
    file = wrapped(graphs.upscaler(tmp_path / "toy.onnx"))
    with pytest.raises(InputError, match=r"must be uint8 images \(batch, height, width, 3\), channels in RGB"):
        file(images)


def test_twice_is_refused(tmp_path):
    source = graphs.upscaler(tmp_path / "toy.onnx")
    with pytest.raises(InputError, match="already takes uint8 images: leave out --preprocess"):
        with_preprocessing(onnx.load(source), replace(OnnxModel(source).spec, input_type="uint8"))
