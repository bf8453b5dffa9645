"""Disparities for pixels that fail the left-right consistency check, from confirmed ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from visionattn.errors import InputError, require
from visionattn.predict.consistency import seen_in_both
from visionattn.predict.matching import as_tensor
from visionattn.predict.smoothing import smooth

__all__ = ["fill_inconsistent", "fill_left", "fill_rows"]

# Chosen on the Middlebury scenes motorcycle and wood2.
TOLERANCE = 0.5
SPECKLE = 200  # pixels
STEP = 1  # largest difference of neighbours in a region
CONFIDENCES = (1e-3, 0.01, 1.0)  # not confirmed; confirmed, but in a small region; confirmed
STRENGTH = 1000.0
CONTRAST = 2.0  # in 256 levels
UNIT = 16  # OpenCV's disparities are whole numbers of 1/16 pixel


def fill_inconsistent(
    disparity: np.ndarray, left: np.ndarray, right: np.ndarray, tolerance: float = TOLERANCE
) -> np.ndarray:
    """Replace disparities that fail the left-right consistency check, and smooth all along the edges of the views.

    A pixel that is occluded, outside of the other view or wrong takes the smaller of the nearest confirmed disparities
    to its left and right in its row (`fill_rows`). In rows without any, pixels keep their own; if it is unknown,
    they take the smaller of the nearest ones above and below. Then each view is smoothed
    (`visionattn.predict.smoothing`), with a confidence of 1 for confirmed disparities and of 0.001 for others: where no
    edge is in between, these follow the confirmed ones in all directions. Confirmed disparities in regions of at most
    200 pixels (OpenCV's filter of speckles, for disparities below 2048) fill no others, and have a confidence of 0.01.

    Args:
        disparity: Floats (2, H, W), of the left and of the right view; only finite values above 0 are known.
        left: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1, as in `visionattn.predict.estimate_disparity`.
        right: The same, with the same size.
        tolerance: Largest difference of two confirmed disparities, in pixels.

    Returns:
        (2, H, W) of the same type; a view of which nothing is known stays as it is.

    Raises:
        InputError: Shapes do not match, or type or values of the views are not accepted.
        MissingPackageError: OpenCV is not installed.
    """
    _check(disparity, left, right)
    # The right view is a left one in a mirror.
    mirrored = fill_left(disparity[::-1, :, ::-1], right[:, ::-1], tolerance)
    return np.stack([fill_left(disparity, left, tolerance), mirrored[:, ::-1]])


def fill_left(disparity: np.ndarray, left: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """The same for the left view alone, (H, W), in half of the time (arguments and errors: see `fill_inconsistent`)."""
    _check(disparity, left)
    confirmed = seen_in_both(disparity, tolerance)
    certain = _without_speckles(confirmed, disparity[0])
    known = np.where((disparity[0] > 0) & (disparity[0] < np.inf), disparity[0], np.nan)
    values = fill_rows(np.where(certain, disparity[0], np.nan))
    values = np.where(confirmed | np.isnan(values), known, values)
    values = fill_rows(values.T).T
    colours = 255 * as_tensor(left)[0].permute(1, 2, 0).numpy()
    found = smooth(values, np.choose(confirmed.astype(int) + certain, CONFIDENCES), colours, STRENGTH, CONTRAST)
    return np.where(np.isnan(found), disparity[0], found).astype(disparity.dtype)


def _check(disparity: np.ndarray, *views: np.ndarray) -> None:
    for view in views:
        if disparity.shape != (2, *view.shape[:2]):
            raise InputError(
                f"The disparities must be (2, H, W), of the views' size; got {disparity.shape} and {view.shape}."
            )


def _without_speckles(confirmed: np.ndarray, disparity: np.ndarray) -> np.ndarray:
    """Confirmed pixels, without regions of few pixels whose neighbours have similar disparities."""
    cv2: Any = require("cv2", "images")
    largest = np.iinfo(np.int16).max
    image = np.where(confirmed, np.clip(UNIT * disparity, 0, largest), -1).astype(np.int16, order="C")
    cv2.filterSpeckles(image, -1, SPECKLE, UNIT * STEP)
    return image >= 0


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
