from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.export import graphs
from visionattn.data.restore.bicubic import downscale
from visionattn.export.examples import load_examples
from visionattn.export.fitting import feeds, fit_example
from visionattn.export.spec import ExportSpec


def spec_of(**facts):
    return ExportSpec.of(graphs.Facts(**facts), None, True, 20, "drawn", None)


def test_inputs_follow_the_metadata():
    spec = spec_of(task="classify", num_classes=2)
    (example, *_) = load_examples(spec, None)
    image = example.images[0]
    (values,) = feeds(replace(spec, batch=3), example).values()
    assert values.shape == (3, 3, 32, 32)
    expected = (image / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
    np.testing.assert_allclose(values[2], expected.transpose(2, 0, 1), atol=1e-6)
    (values,) = feeds(replace(spec, input_type="uint8"), example).values()
    np.testing.assert_array_equal(values, image[None])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_the_ground_truth_of_its_downscaling(channels):
    spec = spec_of(task="restore", scale=3, output_names=("upscaled",))
    spec = replace(spec, input_size=[channels, 16, 16], mean=None, std=None)
    picture = np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8)
    example = fit_example(spec, (picture,))
    assert example.truth.shape == (39, 30, channels)
    np.testing.assert_array_equal(example.images[0], downscale(example.truth, 3))
    if channels == 3:
        np.testing.assert_array_equal(example.truth, picture[:39, :30])


def test_a_label_stays_with_its_picture():
    example = fit_example(spec_of(size=24, task="classify", num_classes=5), (np.full((30, 40, 3), 7, np.uint8),), 4)
    assert example.truth == 4
    np.testing.assert_array_equal(example.images[0], np.full((24, 24, 3), 7))
