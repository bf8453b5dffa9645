"""An image that shows bicubic interpolation and the network side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from visionattn.predict.images.picture import Picture, on_white

__all__ = ["side_by_side"]

MOST = 1600  # largest side of each half in pixels; a larger result is cropped to its centre
STRIP = 28


def side_by_side(source: np.ndarray, result: np.ndarray) -> Picture:
    """Bicubic upscaling on the left, the network's result on the right, labelled: the same region at the same size.

    Args:
        source: uint8 or uint16 (H, W, C).
        result: (r H, r W, C), of the same type.
    """
    scale = result.shape[0] // source.shape[0]
    rows, columns = (_middle(side, max(MOST // scale, 1)) for side in source.shape[:2])
    low = _shown(source[rows, columns])
    left = low.resize((scale * low.width, scale * low.height), Image.Resampling.BICUBIC)
    right = _shown(result[tuple(slice(scale * part.start, scale * part.stop) for part in (rows, columns))])
    picture = Image.new("RGB", (2 * left.width + 4, left.height + STRIP), "white")
    pen = ImageDraw.Draw(picture)
    for start, half, label in ((0, left, "bicubic"), (left.width + 4, right, "network")):
        pen.text((start + 4, 6), label, fill="black")
        picture.paste(half, (start, STRIP))
    return Picture.of(picture)


def _middle(length: int, most: int) -> slice:
    start = max(length - most, 0) // 2
    return slice(start, start + min(length, most))


def _shown(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.shape[2] in (2, 4):
        pixels = on_white(pixels)
    return Picture(np.ascontiguousarray(pixels)).image().convert("RGB")
