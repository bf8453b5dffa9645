"""Masks in colours over their image: one, or ground truth and prediction in a row with the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from visionattn.data.segment.masks import IGNORE, PALETTE

__all__ = ["compare_masks", "overlay_mask"]

_SIDE = 320  # pixels of a panel's longer side
_GAP = 4
_LINE = 16  # height of a line of text
_OPACITY = 0.6
_IGNORED = (224, 224, 224)


def overlay_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image in grey, painted in the colours of VOC; ignored pixels are light grey.

    Args:
        image: Image of the size of the mask.
        mask: Classes, uint8 (H, W).

    Returns:
        An RGB image of that size.
    """
    colours = PALETTE.astype(np.float32)
    colours[IGNORE] = _IGNORED
    grey = np.asarray(image.convert("L"), np.float32)[:, :, None]  # colours are those of classes only
    mixed = (1 - _OPACITY) * grey + _OPACITY * colours[mask]
    return Image.fromarray(mixed.round().astype(np.uint8))


def compare_masks(image: Image.Image, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Draw masks over an image in the colours of VOC; ignored pixels are light grey in the ground truth.

    Args:
        image: Image of the size of the masks.
        truth: Ground-truth classes, uint8 (H, W).
        prediction: Predicted classes, uint8 (H, W).
        classes: Names of the classes.

    Returns:
        An RGB image: the image, ground truth, prediction, and below them a line for each class in either mask.
    """
    factor = _SIDE / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    panels = [picture]
    for mask in (truth, prediction):
        small = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
        panels.append(overlay_mask(picture, small))
    present = sorted({int(label) for mask in (truth, prediction) for label in np.unique(mask)} - {IGNORE})
    columns = max(1, (3 * width + 2 * _GAP) // 150)
    lines = -(-len(present) // columns)
    sheet = Image.new("RGB", (3 * width + 2 * _GAP, height + _GAP + lines * _LINE), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * (width + _GAP), 0))
    draw = ImageDraw.Draw(sheet)
    for number, label in enumerate(present):
        x, y = number % columns * 150, height + _GAP + number // columns * _LINE
        colour = (0.4 * 255 + _OPACITY * PALETTE[label]).round().astype(int)
        draw.rectangle((x, y + 2, x + 12, y + 12), fill=tuple(colour.tolist()), outline="#888")
        draw.text((x + 17, y + 1), classes[label][:20], "black")
    return sheet
