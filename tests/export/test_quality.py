from __future__ import annotations

import math

import numpy as np
import pytest

from tests.export import graphs
from visionattn.errors import ExportError
from visionattn.export.examples import load_examples
from visionattn.export.fitting import Example
from visionattn.export.quality import Quality, Runner, measure_change, measure_quality, measure_speed
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec

BLANK = np.zeros((1, 1, 3), np.uint8)


def spec_of(**facts):
    return ExportSpec.of(graphs.Facts(**facts), None, True, 20, "drawn", None)


def test_psnr_is_that_of_the_truth():
    truth = np.full((24, 24, 3), 100, np.uint8)
    outputs = [np.full((3, 24, 24), value / 255, np.float32) for value in (104, 108)]
    quality = measure_quality(spec_of(task="restore", scale=2), [Example((BLANK,), truth)], *[[o] for o in outputs])
    luma = 65.481 + 128.553 + 24.966
    assert quality.reference == pytest.approx(20 * math.log10(255 / (4 * luma / 255)))
    assert quality.loss == pytest.approx(20 * math.log10(2))
    assert not quality.passed
    pictures = [(output.transpose(1, 2, 0) * 255).round().astype(np.uint8) for output in outputs]
    assert measure_quality(
        spec_of(task="restore", scale=2), [Example((BLANK,), truth)], [outputs[0]], [pictures[1]]
    ).value == pytest.approx(quality.value)


def test_results_that_are_not_finite_fail():
    truth = np.full((24, 24, 3), 100, np.uint8)
    outputs = [np.full((3, 24, 24), value, np.float32) for value in (0.4, np.nan)]
    quality = measure_quality(spec_of(task="restore", scale=2), [Example((BLANK,), truth)], *[[o] for o in outputs])
    assert not quality.passed
    features = spec_of(task="classify")
    assert not measure_quality(features, [Example((BLANK,))], [np.ones(4)], [np.full(4, np.nan)]).passed


def test_accuracy_and_equal_classes():
    logits = np.eye(4, dtype=np.float32)
    spec = spec_of(task="classify", num_classes=4)
    examples = [Example((BLANK,), label) for label in (0, 1, 2, 0)]
    quality = measure_quality(spec, examples, logits, logits[[0, 1, 3, 3]])
    assert (quality.metric, quality.reference, quality.value) == ("accuracy in %", 75, 50)
    assert (quality.loss, quality.passed) == (25, False)
    unlabelled = [Example((BLANK,)) for _ in range(4)]
    quality = measure_quality(spec, unlabelled, logits, logits[[0, 1, 3, 3]])
    assert (quality.metric, quality.reference, quality.value) == ("equal first classes in %", 100, 75)


def test_features_by_cosine_and_by_rank():
    spec = spec_of(task="classify")
    one, turned = np.array([1.0, 0.0]), np.array([math.cos(0.1), math.sin(0.1)])
    quality = measure_quality(spec, [Example((BLANK,))], [one], [turned])
    assert quality.loss == pytest.approx(1 - math.cos(0.1))
    examples = [Example((BLANK,), label) for label in (0, 0, 1, 1)]
    features = [np.array(x, np.float32) for x in ([1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9])]
    quality = measure_quality(spec, examples, features, [features[0], features[2], features[1], features[3]])
    assert (quality.metric, quality.reference) == ("mAP in %", 100)
    assert quality.value < 60


def test_bad_pixels_of_stereo():
    truth = np.array([[5.0, 5.0, 5.0, np.nan]])
    good, bad = np.full((2, 1, 4), 5.5), np.array([[[5.0, 7.5, 5.0, 0.0]], [[0.0, 0, 0, 0]]])
    quality = measure_quality(spec_of(task="stereo"), [Example((BLANK, BLANK), truth)], [good], [bad])
    assert (quality.reference, quality.value) == (0, pytest.approx(100 / 3))
    assert quality.loss == pytest.approx(100 / 3)  # more is worse


def test_a_gain_in_one_scene_does_not_make_up_for_a_loss_in_another():
    spec, truth = spec_of(task="stereo"), np.full((1, 4), 5.0)
    examples = [Example((BLANK, BLANK), truth)] * 2
    right, half, quarter = (np.array([[[5.0, 5.0, x, y]]]) for x, y in ((5, 5), (9, 9), (5, 9)))
    reference, outputs = [half, right], [quarter, quarter]
    assert measure_quality(spec, examples, reference, outputs).loss == 0
    assert measure_change(spec, examples, reference, outputs) == 25


def test_nan_is_no_pass():
    assert not Quality("cosine", 1, math.nan, math.nan, 0.1, 1).passed


def test_a_file_is_as_fast_as_itself(tmp_path):
    path = graphs.upscaler(tmp_path / "toy.onnx")
    spec = OnnxModel(path).spec
    example = load_examples(spec, None)[0]
    ratio, spread = measure_speed(Runner(path, spec), Runner(path, spec), example)
    assert 0.5 < ratio < 2
    assert spread >= 0


def test_what_does_not_load(tmp_path):
    path = graphs.upscaler(tmp_path / "toy.onnx")
    spec = OnnxModel(path).spec
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ExportError, match="cannot load the variant"):
        Runner(path, spec)


def test_stereo_without_truth_is_compared_with_float32():
    reference, output = np.full((2, 1, 4), 5.0), np.array([[[5.0, 7.5, 5.0, 5.0]], [[0.0, 0, 0, 0]]])
    quality = measure_quality(spec_of(task="stereo"), [Example((BLANK, BLANK))], [reference], [output])
    assert (quality.metric, quality.reference, quality.value) == ("moved by 2 pixels in %", 0, 25)
