"""`OnnxModel` refuses values that no prepared image has."""

import numpy as np
import pytest

from tests.runtime import toys
from visionattn.errors import InputError
from visionattn.export import OnnxModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return OnnxModel(toys.write(toys.Labelled().eval(), tmp_path_factory.mktemp("file") / "toy.onnx"))


def test_noise_and_prepared_images_are_taken(model):
    rng = np.random.default_rng(0)
    for images in (rng.normal(size=(2, 3, 32, 32)), (rng.random((1, 3, 40, 9)) - 0.4) / 0.2):
        assert model(images.astype(np.float32))[0].shape == (len(images), 3)
    assert model(np.zeros((0, 3, 32, 32), np.float32))[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            255,
            r"image has values from 0 to 255; preprocessed images of this file are in -2\.5 to 3\.5: scale them to 0",
        ),
        (-200, r"values from -200 to 0"),
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-np.inf, "NaN or infinite"),
    ],
)
def test_other_values_are_refused(model, value, told):
    images = np.zeros((1, 3, 32, 32), np.float32)
    images[0, 1, 2, 3] = value
    with pytest.raises(InputError, match=told):
        model(images)
