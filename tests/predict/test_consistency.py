from __future__ import annotations

import numpy as np
import pytest

from visionattn.predict import seen_in_both
from visionattn.predict.consistency import fill_inconsistent


def test_pixels_that_both_views_confirm():
    left = np.full((4, 20), 3.0)
    right = np.full((4, 20), 3.0)
    left[1, 10], right[2, 7] = 8.0, 3.5  # a wrong one, and one within the tolerance
    right[3, 4] = 9.0  # what the left pixel 7 of that row meets
    expected = np.ones((4, 20), bool)
    expected[:, :3] = False  # out of the right view
    expected[1, 10] = expected[3, 7] = False
    np.testing.assert_array_equal(seen_in_both(np.stack([left, right])), expected)
    # Between pixels the other view is interpolated: 0.5 (3 + 4) is 0.6 off 2.9, not 1.1.
    pair = np.stack([np.full((1, 6), 2.5), np.full((1, 6), 3.0)])
    pair[1, 0, ::2] = 4.0
    assert seen_in_both(pair)[0, 3:].all()
    assert not seen_in_both(np.full((2, 3, 4), np.nan)).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unknown", [np.nan, np.inf, 0, -1])
def test_a_match_at_a_whole_column_does_not_depend_on_the_next(unknown):
    pair = np.full((2, 1, 8), 2.0)
    pair[1, 0, 4] = pair[0, 0, 7] = unknown
    np.testing.assert_array_equal(seen_in_both(pair)[0], [0, 0, 1, 1, 1, 1, 0, 0])
    pair[0, 0, 5] = 1.5  # between the columns 3 and 4
    assert not seen_in_both(pair)[0, 5]
    np.testing.assert_array_equal(fill_inconsistent(pair), np.full((2, 1, 8), 2.0))


def a_wall_behind_an_object():
    """Both views of a wall of disparity 2 and an object of disparity 5 at columns 8 to 11 of the left view."""
    left, right = np.full((3, 16), 2.0), np.full((3, 16), 2.0)
    left[:, 8:12], right[:, 3:7] = 5, 5
    return np.stack([left, right])


def test_occluded_pixels_take_the_value_of_the_background():
    truth = a_wall_behind_an_object()
    guessed = truth.copy()
    guessed[0, :, :2] = 9  # outside of the right view
    guessed[0, :, 5:8] = 3.2  # occluded by the object
    guessed[0, 1, 14] = np.nan  # not known
    guessed[1, :, 7:10] = 3.2  # occluded in the right view
    guessed[1, :, 14:] = 7  # outside of the left view
    np.testing.assert_array_equal(fill_inconsistent(guessed), truth)
    np.testing.assert_array_equal(fill_inconsistent(truth), truth)
    assert fill_inconsistent(guessed.astype(np.float32)).dtype == np.float32


def test_a_row_that_nothing_confirms_stays():
    pair = np.stack([np.full((1, 6), 1.0), np.full((1, 6), 4.0)])
    np.testing.assert_array_equal(fill_inconsistent(pair), pair)


@pytest.mark.parametrize("tolerance", [0.2, 1.0])
def test_tolerance(tolerance):
    pair = np.stack([np.full((1, 6), 2.0), np.full((1, 6), 2.0)])
    pair[0, 0, 4] = 2.5
    assert fill_inconsistent(pair, tolerance)[0, 0, 4] == (2 if tolerance < 0.5 else 2.5)
