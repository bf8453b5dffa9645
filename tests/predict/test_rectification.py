"""Rows of a pair that do not match are measured, to fractions; rectified pairs give no note."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from visionattn.predict.rectification import describe_rows, row_offset


def pair(height=240, width=320, rows=0, seed=0):
    """Views of a textured plane of disparity 12, the right one some rows lower."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 6 + 10, width // 6 + 10, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(noise).resize((width + 12, height + 20), Image.Resampling.BICUBIC))
    return wide[10 : 10 + height, :width], wide[10 - rows : 10 - rows + height, 12:]


@pytest.mark.parametrize("rows", [0, 1, -3, 8])
def test_the_offset_is_measured(rows):
    found = row_offset(*pair(rows=rows))
    assert found.rows == pytest.approx(abs(rows), abs=0.1)
    assert found.matches >= 100


def test_large_images_are_measured_in_their_own_pixels():
    left, right = (np.asarray(Image.fromarray(view).resize((1280, 960))) for view in pair(rows=2))
    assert row_offset(left, right).rows == pytest.approx(8, abs=0.4)


def test_a_note_where_rows_do_not_match():
    (note,) = describe_rows(*pair(rows=3))
    assert (
        "corners are 3.0 rows apart in the two views (median), so that the pair does not seem to be rectified" in note
    )
    assert describe_rows(*pair()) == []


def test_a_turned_view_is_told():
    left, right = pair()
    turned = np.asarray(Image.fromarray(right).rotate(2, Image.Resampling.BICUBIC))
    assert row_offset(left, turned).rows > 1.5


@pytest.mark.parametrize("shape", [(240, 320), (8, 12, 3), (64, 64, 3), (100, 4000, 3), (240, 320, 4)])
def test_views_without_corners_tell_nothing(shape):
    assert row_offset(np.full(shape, 90, np.uint8), np.full(shape, 90, np.uint8)) is None


def test_views_of_different_things_tell_nothing():
    assert row_offset(pair(seed=1)[0], pair(seed=2)[1]) is None
