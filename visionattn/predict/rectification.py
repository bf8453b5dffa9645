"""Check whether the rows of a stereo pair match: corners of the left view are searched in several rows of the right.

A network that searches along rows does not detect a pair that is not rectified, and its result is wrong. Corners are
those of Shi and Tomasi (CVPR 1994); a match is the largest normalised correlation of windows around them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.predict.matching import as_tensor

__all__ = ["RowOffset", "describe_rows", "row_offset"]

WIDTH = 640  # number of columns to which views are downsampled
LEAST = 64  # minimum side in pixels, for enough corners
WINDOW, ROWS = 13, 12  # side of the windows, and number of rows searched above and below
CORNERS, CHUNK = 160, 40  # number of corners, and how many are searched at a time
NEAR, CLEAR = 0.85, 0.03  # minimum correlation of a match, and its minimum margin over all other rows
ENOUGH = 20  # minimum number of matches for a meaningful median
SLACK = 8  # columns to the right of the same position, where converging views may have their match
UNEVEN = 1.0  # maximum median distance of offsets from their plane for correct matches, in downsampled pixels
PRECISION = 0.4  # offset that can occur by chance, in downsampled pixels


class RowOffset(NamedTuple):
    """Row offset of matched corners: the median of the distances in pixels, and the number of matches."""

    rows: float
    matches: int


def describe_rows(left: np.ndarray, right: np.ndarray) -> list[str]:
    """A note if a pair does not seem to be rectified.

    Args:
        left: Left view, (H, W) or (H, W, C); see `estimate_disparity`.
        right: Right view, of the same size.
    """
    found = row_offset(left, right)
    ratio = min(1.0, WIDTH / left.shape[1])
    if found is None or found.rows <= max(1.0, PRECISION / ratio):
        return []
    return [
        f"its rows do not match: {found.matches} corners are {found.rows:.1f} rows apart in the two views (median), so "
        "that the pair does not seem to be rectified, as disparities require"
    ]


@torch.inference_mode()
def row_offset(left: np.ndarray, right: np.ndarray) -> RowOffset | None:
    """Measure by how many rows corresponding points are apart; None if too few corners match.

    Args:
        left: Left view, (H, W) or (H, W, C); see `estimate_disparity`.
        right: Right view, of the same size.
    """
    views = [as_tensor(pixels).mean(1, keepdim=True) for pixels in (left, right)]
    height, width = views[0].shape[2:]
    if min(height, width) < LEAST:
        return None
    ratio = min(1.0, WIDTH / width)
    size = round(height * ratio), round(width * ratio)
    first, second = (F.interpolate(view, size, mode="bilinear", antialias=True)[0, 0] for view in views)
    if min(size) < LEAST:
        return None
    found = torch.cat([_match(first, second, places) for places in _corners(first).split(CHUNK)])
    if len(found) < ENOUGH or not _smooth(found):
        return None
    return RowOffset(float(found[:, 2].abs().median()) / ratio, len(found))


def _smooth(found: Tensor) -> bool:
    """Whether most offsets of (row, column, offset) lie on one plane over the image, unlike those of chance matches."""
    known = torch.cat([torch.ones(len(found), 1), found[:, :2] / WIDTH], 1).double()
    offsets = found[:, 2:].double()
    inside = torch.ones(len(found), dtype=torch.bool)
    for _ in range(2):  # the second time without outliers of the first plane
        plane = torch.linalg.lstsq(known[inside], offsets[inside], driver="gelsd").solution
        away = (offsets - known @ plane).abs()[:, 0]
        inside = away <= away.median()
    return bool(away.median() < UNEVEN)


def _corners(view: Tensor) -> Tensor:
    """Rows and columns (N, 2) of the strongest corners of (H, W), at least a window apart."""
    y, x = torch.gradient(view)
    xx, yy, xy = (F.avg_pool2d(product[None], 5, 1, 2)[0] for product in (x * x, y * y, x * y))
    strength = (xx + yy) / 2 - ((xx - yy).square() / 4 + xy.square()).sqrt()  # the smaller eigenvalue
    margin = WINDOW // 2 + ROWS
    inside = torch.zeros_like(strength)
    inside[margin:-margin, margin:-margin] = 1
    strength = strength * inside
    peaks = strength == F.max_pool2d(strength[None], WINDOW, 1, WINDOW // 2)[0]
    strength = torch.where(peaks, strength, 0).flatten()
    values, places = strength.topk(min(CORNERS, len(strength)))
    places = places[values > 1e-5]
    return torch.stack([places // view.shape[1], places % view.shape[1]], 1)


def _match(first: Tensor, second: Tensor, places: Tensor) -> Tensor:
    """Row and column of corners (N, 2) with a clear match, and its row offset: (M, 3)."""
    half, width = WINDOW // 2, first.shape[1]
    reach = width // 3
    padded = F.pad(second[None], (reach, SLACK), mode="replicate")[0]
    windows, strips = [], []
    for row, column in places.tolist():
        windows.append(first[row - half : row + half + 1, column - half : column + half + 1])
        strips.append(
            padded[row - half - ROWS : row + half + ROWS + 1, column - half : column + half + reach + SLACK + 1]
        )
    if not windows:
        return torch.empty(0, 3)
    window, strip = torch.stack(windows), torch.stack(strips)  # (N, w, w), (N, w + 2 R, ...)
    window = window - window.mean((1, 2), keepdim=True)
    window = window / window.square().sum((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    products = F.conv2d(strip[None], window[:, None], groups=len(window))[0]
    means, squares = (F.avg_pool2d(values[None], WINDOW, 1)[0] for values in (strip, strip.square()))
    norms = ((squares - means.square()) * WINDOW**2).clamp(min=1e-8).sqrt()
    best = (products / norms).amax(2)  # (N, 2 R + 1)
    top, row = best.max(1)
    apart = (torch.arange(best.shape[1]) - row[:, None]).abs() > 2
    other = torch.where(apart, best, -1).amax(1)
    clear = (top > NEAR) & (top - other > CLEAR) & (row > 0) & (row < 2 * ROWS)
    best, row = best[clear], row[clear]
    below, here, above = (best.gather(1, (row + step)[:, None])[:, 0] for step in (-1, 0, 1))
    fraction = (below - above) / (2 * (below - 2 * here + above)).clamp(max=-1e-6)
    return torch.cat([places[clear], (row - ROWS + fraction)[:, None]], 1)
