"""Pairs of views with the ground truth of their matches, and geometric transforms of both.

The ground truth is a field as in `visionattn.models.match_stereo`: the position of a pixel's match in the other view,
relative to the pixel, (x, y) in pixels. In stereo x is minus the disparity in the left view and the disparity in the
right one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["MatchPair", "crop", "flip", "matches_inside", "resize", "seen_by_order"]


class MatchPair(NamedTuple):
    """Both views, the left or first one first.

    Attributes:
        views: uint8 (2, H, W, 3).
        fields: float32 (2, H, W, 2) in pixels, NaN where the ground truth is unknown.
        seen: bool (2, H, W), whether the other view sees the pixel too; False where the ground truth is unknown.
    """

    views: np.ndarray
    fields: np.ndarray
    seen: np.ndarray


def matches_inside(fields: np.ndarray) -> np.ndarray:
    """Whether matches lie within the other view's pixels; (..., H, W, 2) -> (..., H, W), False for NaN."""
    height, width = fields.shape[-3:-1]
    x, y = fields[..., 0] + np.arange(width), fields[..., 1] + np.arange(height)[:, None]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def seen_by_order(fields: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Which pixels the other view sees too, from the ground truth of one view alone, by the order of disparities.

    Args:
        fields: (H, W, 2) with y = 0.
        tolerance: In pixels; a match in the same column that is nearer by more than this occludes a pixel.

    Returns:
        bool (H, W): the match lies within the image, and no pixel of the row with a larger disparity has its match
        in the same column, rounded up or down.
    """
    height, width = fields.shape[:2]
    disparity = np.abs(fields[..., 0])
    inside = matches_inside(fields)
    row, column = np.nonzero(inside)
    match, d = column + fields[inside][:, 0], disparity[inside]
    nearest = np.zeros((height, width), np.float32)
    ends = np.floor(match).astype(np.int64), np.ceil(match).astype(np.int64)
    for end in ends:
        np.maximum.at(nearest, (row, end), d)
    seen = np.zeros((height, width), bool)
    seen[row, column] = np.minimum(nearest[row, ends[0]], nearest[row, ends[1]]) <= d + tolerance
    return seen


def flip(pair: MatchPair, exchange: bool) -> MatchPair:
    """Mirror left and right.

    Args:
        pair: A pair.
        exchange: Exchange the views too: mirroring a stereo pair swaps its cameras.
    """
    mirrored = MatchPair(*(array[:, :, ::-1] for array in pair))
    fields = mirrored.fields * np.array([-1, 1], np.float32)
    return _exchanged(mirrored._replace(fields=fields)) if exchange else mirrored._replace(fields=fields)


def _exchanged(pair: MatchPair) -> MatchPair:
    return MatchPair(*(array[::-1] for array in pair))


def resize(pair: MatchPair, height: int, width: int) -> MatchPair:
    """Resize a pair: views by interpolation, the field from the nearest pixel, since averages mix surfaces."""
    old_height, old_width = pair.seen.shape[1:]
    views = [
        Image.fromarray(np.ascontiguousarray(v)).resize((width, height), Image.Resampling.BILINEAR) for v in pair.views
    ]
    # The nearest pixel is offset from the new one's centre, and so is its match: the difference of both is kept.
    row = ((np.arange(height) + 0.5) * (old_height / height)).astype(np.int64)
    column = ((np.arange(width) + 0.5) * (old_width / width)).astype(np.int64)
    nearest = np.ix_(np.arange(2), row, column)
    scale = np.array([width / old_width, height / old_height], np.float32)
    return MatchPair(np.stack([np.asarray(v) for v in views]), pair.fields[nearest] * scale, pair.seen[nearest])


def crop(pair: MatchPair, top: int, left: int, height: int, width: int) -> MatchPair:
    """Cut the same window out of both views; pixels whose match is cut off are no longer marked as seen."""
    window = np.s_[:, top : top + height, left : left + width]
    cut = MatchPair(*(array[window] for array in pair))
    return cut._replace(seen=cut.seen & matches_inside(cut.fields))
