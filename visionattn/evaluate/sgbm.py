"""OpenCV's semi-global block matching, the classical method to stand beside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from visionattn.errors import InputError, require

__all__ = ["sgbm"]

BLOCK = 5
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
        InputError: OpenCV cannot do it, as where the images are hardly wider than what it looks through.
    """
    cv2: Any = require("cv2", "images")
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
        height, width = left.shape[:2]
        raise InputError(
            f"OpenCV's semi-global matching fails on {height} x {width} pixels with disparities up to {largest:.0f}."
        ) from error
    return np.where(found >= 0, found, np.nan)
