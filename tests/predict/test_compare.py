"""The side-by-side picture: same part, same size, bicubic left, network right."""

import numpy as np
import pytest
from PIL import Image

from tests.predict.upscalers import picture, repeated
from visionattn.predict import compare
from visionattn.predict.compare import STRIP, side_by_side


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_halves(channels, dtype):
    source = picture(60, 80, channels, dtype)
    if channels in (2, 4):
        source[..., -1] = np.iinfo(dtype).max
    pixels = side_by_side(source, repeated(source)).pixels
    assert pixels.shape == (120 + STRIP, 2 * 160 + 4, 3)
    eight = source if dtype == np.uint8 else (source >> 8).astype(np.uint8)
    colour = eight[..., :3] if channels > 2 else eight[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(pixels[STRIP:, 164:], repeated(colour))
    bicubic = Image.fromarray(colour).resize((160, 120), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels[STRIP:, :160], np.asarray(bicubic))


def test_labels_are_drawn():
    source = np.full((60, 80, 3), 255, np.uint8)
    pixels = side_by_side(source, repeated(source)).pixels
    left, right = pixels[:STRIP, :160], pixels[:STRIP, 164:]
    assert max(left.min(), right.min()) < 50
    assert (left != right).any()


def test_a_large_result_is_shown_by_its_middle(monkeypatch):
    monkeypatch.setattr(compare, "MOST", 40)
    source = picture(60, 80)
    pixels = side_by_side(source, repeated(source)).pixels
    np.testing.assert_array_equal(pixels[STRIP:, 44:], repeated(source[20:40, 30:50]))
