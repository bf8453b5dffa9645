"""Tiles cover a picture once, reach as far as they should, and fit the memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.predict.upscalers import Blur, Repeat
from visionattn.errors import InputError
from visionattn.predict.tiles import MIB, MOST_ON_CPU, WORKSPACE, bytes_per_pixel, default_memory, plan


@given(st.integers(1, 90), st.integers(1, 90), st.integers(100, 9000), st.integers(0, 4))
def test_each_pixel_is_kept_once_by_windows_that_fit(height, width, pixels, overlap):
    times = np.zeros((height, width), int)
    for tile in plan(height, width, pixels, overlap):
        times[tile.kept] += 1
        window_shape = times[tile.window].shape
        assert np.prod(window_shape) <= pixels
        for window, kept, length in zip(tile.window, tile.kept, (height, width)):
            assert window.start == max(kept.start - overlap, 0) or window == slice(0, length)
            assert window.stop == min(kept.stop + overlap, length) or window == slice(0, length)
    assert (times == 1).all()


def test_what_fits_is_one_tile():
    assert len(plan(30, 40, 1200, 21)) == 1
    assert len(plan(30, 40, 1199, 2)) > 1


def test_a_long_strip_is_cut_along_its_length_only():
    tiles = plan(10, 1000, 2000, 5)
    assert all(tile.window[0] == slice(0, 10) for tile in tiles)
    assert len(tiles) == 6  # windows of 200, of which 190 are kept


def test_memory_that_is_all_overlap_is_an_error():
    with pytest.raises(InputError, match="overlap alone takes 42"):
        plan(100, 100, 42 * 42, 21)


def test_places_in_window_and_result():
    tile = plan(10, 100, 400, 5)[1]
    assert tile.window == (slice(0, 10), slice(20, 55))
    assert tile.kept == (slice(0, 10), slice(25, 50))
    assert tile.inside(2) == (slice(0, 20), slice(10, 60))
    assert tile.target(2) == (slice(0, 20), slice(50, 100))


def test_bytes_of_a_pass_are_counted():
    # The largest moment of Repeat(2): image 3, spread 12 channels (the shuffle makes another 12, image alive).
    assert bytes_per_pixel(Repeat(2), 3) == WORKSPACE * 4 * (3 + 12 + 12)
    assert bytes_per_pixel(Repeat(2).double(), 3) == WORKSPACE * 8 * (3 + 12 + 12)


def test_what_is_freed_does_not_count():
    chain = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(9)))
    assert bytes_per_pixel(chain, 1) == WORKSPACE * 4 * 3  # image, input and output of a layer


def test_weights_do_not_count():
    class Linear(nn.Linear):
        def forward(self, x):
            return x.mean((2, 3)) @ self.weight.t()  # a view of the weight's storage

    assert bytes_per_pixel(Linear(3, 5000), 3) * 48**2 == WORKSPACE * 4 * (3 * 48**2 + 3 + 5000)


def test_default_memory_is_bounded():
    assert MIB <= default_memory(torch.device("cpu")) <= MOST_ON_CPU


def test_the_count_of_blur_grows_with_its_channels():
    assert bytes_per_pixel(Blur(4), 3) > bytes_per_pixel(Blur(2), 3)
