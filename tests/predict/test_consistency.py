from __future__ import annotations

import numpy as np
import pytest

from visionattn.predict import seen_in_both


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
