"""The requested size of an image, and resampling to that size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from visionattn.errors import InputError

__all__ = ["check_sides", "fit", "resample"]

LARGEST = 2**20  # largest side in pixels


def check_sides(width: int | None, height: int | None) -> None:
    """Raise `InputError` for an invalid width or height."""
    for name, side in (("width", width), ("height", height)):
        if side is not None and not 1 <= side <= LARGEST:
            raise InputError(f"The {name} must be from 1 to {LARGEST} pixels; got {side}.")


def fit(shape: tuple[int, ...], width: int | None, height: int | None) -> tuple[int, int] | None:
    """Height and width of an image (H, W, ...) at its aspect ratio: as wide, as high, or the largest within both.

    Args:
        shape: Shape of the image.
        width: Width in pixels, or None.
        height: Height in pixels, or None. The result is None if both are.
    """
    rows, columns = shape[:2]
    ratios = [side / own for side, own in ((height, rows), (width, columns)) if side is not None]
    if not ratios:
        return None
    return max(1, round(min(ratios) * rows)), max(1, round(min(ratios) * columns))


def resample(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample (H, W, C) to another height and width with a Lanczos filter; type and range are kept.

    Args:
        pixels: uint8, uint16 or floats in 0..1.
        size: Height and width.
    """
    if pixels.shape[:2] == size:
        return pixels
    result = np.empty((*size, pixels.shape[2]), pixels.dtype)
    peak = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., channel], np.float32))
        values = np.asarray(plane.resize(size[::-1], Image.Resampling.LANCZOS)).clip(0, peak)
        result[..., channel] = np.rint(values) if pixels.dtype.kind == "u" else values
    return result
