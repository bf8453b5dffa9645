"""OpenCV's semi-global block matching, the classical baseline."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from visionattn.errors import InputError, require
from visionattn.predict.filling import fill_rows

__all__ = ["fill", "sgbm"]

BLOCK = 5
MEDIAN = 5  # side of the window that smooths a filled disparity
UNIT = 16  # OpenCV requires numbers of disparities divisible by it, and returns disparities times it


def sgbm(left: np.ndarray, right: np.ndarray, largest: float) -> np.ndarray:
    """Disparity by semi-global matching (Hirschmueller, PAMI 2008) with the settings of OpenCV's documentation.

    Colour images, blocks of 5 x 5, penalties P1 = 8 * 3 * 5 * 5 and P2 = 32 * 3 * 5 * 5, three-way mode, uniqueness
    ratio of 10 %; speckles of up to 100 pixels, with a range of 2, are removed.

    Args:
        left: uint8 (H, W, 3).
        right: uint8 (H, W, 3).
        largest: Largest disparity to search for, in pixels.

    Returns:
        float32 (H, W) in pixels, NaN where no disparity is found.

    Raises:
        MissingPackageError: OpenCV is not installed.
        InputError: The disparities exceed the image width, or OpenCV fails, for example because the images are hardly
            wider than the search range.
    """
    cv2: Any = require("cv2", "images")
    height, width = left.shape[:2]
    fails = f"OpenCV's semi-global matching fails on {height} x {width} pixels with disparities up to {largest:.6g}."
    if not 0 <= largest < width:
        raise InputError(f"{fails} Disparities must be smaller than the width: check the ground truth and its factor.")
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
    """Fill the gaps that semi-global matching leaves, as stereo pipelines do, and smooth the result.

    A gap in a row takes the smaller (farther) disparity of its two ends, since occluded pixels belong to the
    background; at the border it takes that of its only end. Rows without any value are filled the same way from above
    and below. A median filter of 5 x 5 pixels follows.

    Args:
        disparity: (H, W) in pixels, NaN where there is none.

    Returns:
        float32 (H, W); all NaN if the input is.

    Raises:
        MissingPackageError: OpenCV is not installed.
    """
    cv2: Any = require("cv2", "images")
    if not np.isfinite(disparity).any():
        return disparity.astype(np.float32)
    filled = fill_rows(fill_rows(disparity.astype(np.float32)).T).T
    return cv2.medianBlur(np.ascontiguousarray(filled), MEDIAN)
