"""Masks: images whose values are class indices of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.images import open_image
from visionattn.errors import DataError, shorten
from visionattn.files import atomic_path

__all__ = ["IGNORE", "PALETTE", "check_labels", "read_mask", "resize_mask", "write_mask"]

IGNORE = 255
"""The value of pixels without a class, such as the outlines of VOC."""


def _palette() -> np.ndarray:
    """VOC's colours: the bits of the class index, spread over red, green and blue from the highest bit down."""
    colours = np.zeros((256, 3), np.uint8)
    index = np.arange(256)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> channel) & 1) << (7 - place)).astype(np.uint8)
        index >>= 3
    return colours


PALETTE = _palette()
"""RGB colours (256, 3) of the classes in overlays, as in PASCAL VOC."""


def read_mask(path: str | Path, zero_is_ignored: bool = False) -> np.ndarray:
    """Read the class of each pixel.

    The indices of a palette image and the values of a grey one are the classes; `IGNORE` means none.

    Args:
        path: A palette or grey image.
        zero_is_ignored: 0 means no class and 1 is the first one, as in ADE20K.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: The file is damaged, has colours instead of indices, or values above 255.
    """
    image = open_image(path)
    if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B", "I;16L"):
        raise DataError(
            f"The mask {shorten(path)} has the mode {image.mode}; a palette or grey image is required, whose values "
            "are class indices."
        )
    values = np.array(image)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.min() < 0 or values.max() > IGNORE:
        raise DataError(
            f"The mask {shorten(path)} has the value {values.max() if values.max() > IGNORE else values.min()}; "
            f"classes must be 0 to 254, or {IGNORE} for ignored pixels."
        )
    mask = values.astype(np.uint8)
    if zero_is_ignored:
        mask = np.where(mask == IGNORE, mask, mask - np.uint8(1))  # 0 wraps around to 255
    return mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write classes uint8 (H, W) as a PNG image with the palette of PASCAL VOC, completely or not at all.

    Raises:
        StorageError: The file could not be written.
    """
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())  # from grey to palette indices of the same values
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def check_labels(mask: np.ndarray, path: str | Path, classes: Sequence[Any]) -> None:
    """Refuse a mask with a class index that has no name.

    Raises:
        DataError: The mask has one.
    """
    largest = int(mask[mask != IGNORE].max(initial=0))
    if largest >= len(classes):
        raise DataError(
            f"The mask {shorten(path)} has the class {largest}, but there are {len(classes)} classes: 0 to "
            f"{len(classes) - 1}. Pixels without a class must have the value {IGNORE}."
        )


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (H, W) by the nearest pixel."""
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
