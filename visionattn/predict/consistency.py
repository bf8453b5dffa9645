"""Left-right consistency of disparities: which pixels both views confirm, and values for the others."""

from __future__ import annotations

import numpy as np

__all__ = ["fill_inconsistent", "fill_rows", "seen_in_both"]


def seen_in_both(disparity: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Find the non-occluded pixels of the left view by left-right consistency.

    Args:
        disparity: (2, H, W), of the left and of the right view; only finite values above 0 are known.
        tolerance: Largest difference of the two at a match, in pixels.

    Returns:
        bool (H, W): False where a pixel is occluded, outside of the right view, wrong, or not known.
    """
    left, right = (np.where((view > 0) & (view < np.inf), view, np.nan) for view in disparity)
    width = left.shape[1]
    place = np.nan_to_num(np.arange(width) - left, nan=-1)
    inside = place >= 0
    place = place.clip(0, width - 1)
    # At a whole column, both are that column: what lies next to it may be not known.
    low, high = (end(place).astype(np.int64) for end in (np.floor, np.ceil))
    part = place - low
    found = (1 - part) * np.take_along_axis(right, low, 1) + part * np.take_along_axis(right, high, 1)
    return inside & (np.abs(left - found) <= tolerance)


def fill_inconsistent(disparity: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Replace disparities that fail the left-right consistency check by those of the background next to them.

    A pixel that is occluded, outside of the other view or wrong takes the smaller of the nearest confirmed disparities
    to its left and right in its row. In rows without any, disparities stay.

    Args:
        disparity: (2, H, W), of the left and of the right view; only finite values above 0 are known.
        tolerance: Largest difference of the two at a match, in pixels.

    Returns:
        (2, H, W) of the same type.
    """
    filled = []
    # The right view is a left one in a mirror.
    for pair in (disparity, disparity[::-1, :, ::-1]):
        found = fill_rows(np.where(seen_in_both(pair, tolerance), pair[0], np.nan))
        filled.append(np.where(np.isnan(found), pair[0], found))
    return np.stack([filled[0], filled[1][:, ::-1]]).astype(disparity.dtype)


def fill_rows(values: np.ndarray) -> np.ndarray:
    """Fill gaps with the smaller of the nearest values to the left and right: occluded pixels belong to the background.

    Args:
        values: float (H, W), NaN in gaps; rows of only gaps stay.
    """
    known = np.isfinite(values)
    column = np.arange(values.shape[1])
    before = np.maximum.accumulate(np.where(known, column, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, column, len(column))[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=np.nan)
    ends = [np.take_along_axis(padded, index + 1, 1) for index in (before, after)]
    return np.where(known, values, np.fmin(*ends))
