"""MATLAB's bicubic: against the pictures that the literature shares, and against a definition written as loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from visionattn.data.images import find_images, read_rgb
from visionattn.data.restore.bicubic import crop_to_multiple, downscale, upscale
from visionattn.errors import InputError

SHARED = Path(__file__).parents[4] / "shared/data/sr"


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_equals_the_published_small_pictures(name, scale):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not on this machine")
    for path in find_images(SHARED / name / "HR"):
        small = downscale(crop_to_multiple(read_rgb(path), scale), scale)
        published = read_rgb(SHARED / name / f"LRbicx{scale}" / path.name)
        assert np.array_equal(small, published), path.name


def kernel(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def defined(line, size):
    """One line, pixel by pixel."""
    scale = size / len(line)
    result = []
    for i in range(size):
        u = (i + 0.5) / scale - 0.5
        weights = {j: kernel(min(scale, 1) * (u - j)) for j in range(-40, len(line) + 40)}
        value = sum(w * float(line[min(max(j, 0), len(line) - 1)]) for j, w in weights.items()) / sum(weights.values())
        result.append(min(max(math.floor(value + 0.5), 0), 255))
    return result


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_equals_the_definition(factor):
    rng = np.random.default_rng(factor)
    image = rng.integers(0, 256, (2 * factor, 5 * factor), dtype=np.uint8)
    for function, height, width in ((downscale, 2, 5), (upscale, 2 * factor**2, 5 * factor**2)):
        rows = np.array([defined(column, height) for column in image.T]).T
        assert function(image, factor).tolist() == [defined(row, width) for row in rows]


def test_colours_are_resized_apart_and_shapes_kept():
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    for function, shape in ((downscale, (3, 5, 3)), (upscale, (48, 80, 3))):
        result = function(image, 4)
        assert result.shape == shape
        assert result.dtype == np.uint8
        for channel in range(3):
            assert np.array_equal(result[..., channel], function(image[..., channel], 4))


def test_overshoot_is_clipped():
    image = np.zeros((4, 8), np.uint8)
    image[:, 4:] = 255
    assert set(np.unique(upscale(image, 2))) > {0, 255}


def test_crop_is_at_the_top_left():
    image = np.arange(7 * 9).reshape(7, 9)
    assert np.array_equal(crop_to_multiple(image, 4), image[:4, :8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: downscale(np.zeros((5, 4), np.uint8), 2), "The height and width of an image must be multiples of 2"),
        (lambda: downscale(np.zeros((4, 4)), 2), "takes 8-bit images"),
        (lambda: upscale(np.zeros((4, 4, 3, 1), np.uint8), 2), "takes 8-bit images"),
        (lambda: upscale(np.zeros((4, 4), np.uint8), 0), "must be at least 1; got 0"),
        (lambda: crop_to_multiple(np.zeros((3, 9), np.uint8), 4), "too small for a factor of 4"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
