"""A picture brought to a size: its ratio, its range and its types stay."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.predict.upscalers import Repeat, picture, repeated
from visionattn import upscale
from visionattn.errors import InputError
from visionattn.predict.sizes import fit, resample


@pytest.mark.parametrize(
    ("shape", "width", "height", "expected"),
    [
        ((300, 400), 800, None, (600, 800)),
        ((300, 400), None, 150, (150, 200)),
        ((300, 400), 800, 300, (300, 400)),
        ((300, 400), 401, 10**6, (301, 401)),
        ((1, 5000), 10, None, (1, 10)),
        ((300, 400), None, None, None),
    ],
)
def test_the_ratio_stays(shape, width, height, expected):
    assert fit((*shape, 3), width, height) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_types_and_range_stay(dtype, channels):
    peak = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    steps = (np.indices((20, 30)).sum(0) // 5 % 2 * peak).astype(dtype)
    found = resample(np.repeat(steps[..., None], channels, 2), (33, 47))
    assert (found.shape, found.dtype) == ((33, 47, channels), dtype)
    assert (found.min(), found.max()) == (0, peak)
    flat = resample(np.full((20, 30, channels), peak, dtype), (7, 9))
    assert (flat == peak).all()


def test_eight_bits_within_the_range_are_those_of_pil():
    pixels = np.random.default_rng(0).integers(100, 160, (40, 50, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((33, 21), Image.Resampling.LANCZOS))
    assert np.abs(resample(pixels, (21, 33)).astype(int) - expected).max() <= 1


def test_upscale_to_a_size():
    pixels = picture(12, 16)
    model = Repeat(2).eval()
    exact = upscale(pixels, model, width=32)
    np.testing.assert_array_equal(exact, repeated(pixels))
    np.testing.assert_array_equal(upscale(pixels, model, height=18), resample(repeated(pixels), (18, 24)))
    np.testing.assert_array_equal(upscale(pixels, model, width=64), resample(repeated(pixels), (48, 64)))
    np.testing.assert_array_equal(upscale(pixels, model, width=8, height=100), resample(pixels, (6, 8)))
    assert upscale(Image.fromarray(pixels), model, width=20).size == (20, 15)
    for side in (0, -1, 2**21):
        with pytest.raises(InputError, match="The height must be from 1 to 1048576 pixels"):
            upscale(pixels, model, height=side)


def test_colours_below_transparent_pixels_make_no_fringe():
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:, 10:] = (200, 100, 50, 255)
    found = upscale(pixels, Repeat(2).eval(), width=7)
    visible = found[..., 3] > 0
    np.testing.assert_array_equal(found[visible][:, :3], np.tile([200, 100, 50], (visible.sum(), 1)))
