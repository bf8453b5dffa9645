"""Left-right consistency of disparities: which pixels both views confirm."""

from __future__ import annotations

import numpy as np

__all__ = ["seen_in_both"]


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
