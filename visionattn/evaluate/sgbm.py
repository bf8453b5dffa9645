"""OpenCV's semi-global block matching, the classical method to stand beside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from visionattn.errors import InputError, require

__all__ = ["fill", "sgbm"]

BLOCK = 5
MEDIAN = 5  # side of the window that smooths a filled disparity
UNIT = 16  # numbers of disparities are multiples of it, and results are in its fractions


def sgbm(left: np.ndarray, right: np.ndarray, largest: float) -> np.ndarray:
    """Disparity by semi-global matching (Hirschmueller, PAMI 2008) with the settings that OpenCV's documentation names.

    Colours, blocks of 5 x 5, penalties 8 and 32 times 3 x 5 x 5, three ways, uniqueness of 10 %, speckles of fewer than
    100 pixels that differ by more than 2 removed.

    Args:
        left: (H, W, 3) of uint8.
        right: Likewise.
        largest: Disparity in pixels up to which it looks.

    Returns:
        (H, W) of float32 in pixels, NaN where it finds none.

    Raises:
        MissingPackageError: OpenCV is not installed.
        InputError: The disparities are not within the images, or OpenCV cannot do it, as where the images are hardly
            wider than what it looks through.
    """
    cv2: Any = require("cv2", "images")
    height, width = left.shape[:2]
    fails = f"OpenCV's semi-global matching fails on {height} x {width} pixels with disparities up to {largest:.6g}."
    if not 0 <= largest < width:
        raise InputError(f"{fails} Matches would lie outside: check the ground truth and its factor.")
    area = 3 * BLOCK**2
    matcher = cv2.StereoSGBM_create(
        minDisparity=0,
        numDisparities=UNIT * max(1, math.ceil((largest + 1) / UNIT)),
        blockSize=BLOCK,
        P1=8 * area,
        P2=32 * area,
        disp12MaxDiff=1,
        uniquenessRatio=10,
        speckleWindowSize=100,
        speckleRange=2,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    try:
        found = matcher.compute(left, right).astype(np.float32) / UNIT
    except cv2.error as error:
        raise InputError(fails) from error
    return np.where(found >= 0, found, np.float32(np.nan))


def fill(disparity: np.ndarray) -> np.ndarray:
    """Fill what semi-global matching leaves out, as stereo pipelines do, and smooth it.

    A gap in a row takes the smaller disparity of its two ends, the farther one, since what one view alone sees lies
    behind; at the border it takes the one end there is. Rows without any value are filled likewise from above and
    below. A median of 5 x 5 pixels follows.

    Args:
        disparity: (H, W) in pixels, NaN where there is none.

    Returns:
        (H, W) of float32; NaN only where there is no value at all.

    Raises:
        MissingPackageError: OpenCV is not installed.
    """
    cv2: Any = require("cv2", "images")
    if not np.isfinite(disparity).any():
        return disparity.astype(np.float32)
    filled = _fill_rows(_fill_rows(disparity.astype(np.float32)).T).T
    return cv2.medianBlur(np.ascontiguousarray(filled), MEDIAN)


def _fill_rows(values: np.ndarray) -> np.ndarray:
    """Gaps (NaN) with the smaller of the nearest values to their left and right; rows of gaps stay."""
    known = np.isfinite(values)
    column = np.arange(values.shape[1])
    before = np.maximum.accumulate(np.where(known, column, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, column, len(column))[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=np.nan)
    ends = [np.take_along_axis(padded, index + 1, 1) for index in (before, after)]
    return np.where(known, values, np.fmin(*ends))
