"""Degradations equal their definition, step by step, from the same random numbers."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import correlate1d

from visionattn.data.restore.degradation import SUBSAMPLINGS, Degradation, compress


def picture(side=24):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))


def seed(number):
    random.seed(number)
    np.random.seed(number)


@pytest.mark.parametrize("number", range(3))
def test_blur_is_a_gaussian(number):
    large = picture()
    seed(number)
    found = Degradation(2.0, 0, None).before(large)
    seed(number)
    sigma = random.uniform(0, 2.0)
    at = np.arange(-np.ceil(3 * sigma), np.ceil(3 * sigma) + 1)
    weights = np.exp(-(at**2) / (2 * sigma**2))
    weights /= weights.sum()
    expected = correlate1d(correlate1d(large.astype(float), weights, 0, mode="mirror"), weights, 1, mode="mirror")
    assert np.abs(found - expected).max() <= 0.51  # rounded to levels


@pytest.mark.parametrize("number", range(3))
def test_noise_and_jpeg_are_exactly_those_of_the_drawn_numbers(number):
    small = picture()
    seed(number)
    found = Degradation(0, 8.0, 30).after(small)
    seed(number)
    noisy = np.random.normal(0, random.uniform(0, 8.0), small.shape) + small
    levels = np.rint(noisy).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    quality = random.randint(30, 95)
    Image.fromarray(levels).save(file, "JPEG", quality=quality, subsampling=random.choice(SUBSAMPLINGS))
    assert np.array_equal(found, np.array(Image.open(file)))


def test_qualities_and_subsamplings_cover_their_ranges(monkeypatch):
    drawn = []
    monkeypatch.setattr("visionattn.data.restore.degradation.compress", lambda image, *given: drawn.append(given))
    seed(0)
    for _ in range(1000):
        Degradation(0, 0, 30).after(picture(8))
    qualities, subsamplings = zip(*drawn)
    assert (min(qualities), max(qualities)) == (30, 95)
    assert set(subsamplings) == set(SUBSAMPLINGS)


def test_subsampling_loses_colour_not_brightness():
    # Columns of red and cyan of one brightness: only chroma at full width keeps them apart.
    image = np.empty((16, 16, 3), np.uint8)
    image[:, ::2], image[:, 1::2] = (200, 90, 90), (40, 152, 152)
    apart = [np.abs(np.diff(compress(image, 95, one)[..., 0].astype(int), axis=1)).mean() for one in SUBSAMPLINGS]
    assert apart[0] > 140
    assert max(apart[1:]) < 20
