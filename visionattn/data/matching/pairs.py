"""Pairs of views with the truth of their matches, and the geometry that keeps both true.

The truth is a field as `visionattn.models.match_stereo` has it: where a pixel's match lies in the other view, relative
to itself, (x, y) in pixels. In stereo x is minus the disparity in the left view, the disparity in the right one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["MatchPair", "crop", "flip", "matches_inside", "resize", "seen_by_order"]


class MatchPair(NamedTuple):
    """Both views, the left or first one first.

    Attributes:
        views: (2, H, W, 3) of uint8.
        fields: (2, H, W, 2) of float32 in pixels, NaN where the truth is not known.
        seen: (2, H, W) of bool, what the other view sees too; False where the truth is not known.
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
    """What the other view sees of a view whose stereo truth alone is known, from which pixels hide which.

    Args:
        fields: (H, W, 2) with y of 0.
        tolerance: In pixels; one that lies further in front at the same place hides.

    Returns:
        (H, W) of bool: the match lies within the image, and no pixel of the row with a larger disparity has its match
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
        exchange: Exchange the views too: a mirrored stereo pair has its left camera on the right.
    """
    mirrored = MatchPair(*(array[:, :, ::-1] for array in pair))
    fields = mirrored.fields * np.array([-1, 1], np.float32)
    return _exchanged(mirrored._replace(fields=fields)) if exchange else mirrored._replace(fields=fields)


def _exchanged(pair: MatchPair) -> MatchPair:
    return MatchPair(*(array[::-1] for array in pair))


def resize(pair: MatchPair, height: int, width: int) -> MatchPair:
    """Bring a pair to another size: views smoothly, truth from the nearest pixel, since a mean lies on no surface."""
    old_height, old_width = pair.seen.shape[1:]
    views = [
        Image.fromarray(np.ascontiguousarray(v)).resize((width, height), Image.Resampling.BILINEAR) for v in pair.views
    ]
    # The nearest pixel lies beside the new one's centre, and so does its match: the field between both is kept.
    row = ((np.arange(height) + 0.5) * (old_height / height)).astype(np.int64)
    column = ((np.arange(width) + 0.5) * (old_width / width)).astype(np.int64)
    nearest = np.ix_(np.arange(2), row, column)
    scale = np.array([width / old_width, height / old_height], np.float32)
    return MatchPair(np.stack([np.asarray(v) for v in views]), pair.fields[nearest] * scale, pair.seen[nearest])


def crop(pair: MatchPair, top: int, left: int, height: int, width: int) -> MatchPair:
    """Cut the same window out of both views; pixels whose match is cut off are seen no longer."""
    window = np.s_[:, top : top + height, left : left + width]
    cut = MatchPair(*(array[window] for array in pair))
    return cut._replace(seen=cut.seen & matches_inside(cut.fields))
