"""Contact sheet of attention maps: one row per image, one panel per layer, frames around sinks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["contact_sheet", "to_image"]

_PANEL = 112  # minimum length of a panel's longer side, in pixels
_GAP = 4
_OPACITY = 0.75  # of the heat map at its maximum
_FRAME = "#17becf"


def to_image(normalised: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undo the normalisation of an image (C, H, W) with 1, 3 or 4 channels."""
    scale, shift = (normalised.new_tensor(list(values))[:, None, None] for values in (std, mean))
    pixels = (255 * (normalised * scale + shift)).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def contact_sheet(
    images: Sequence[Image.Image],
    maps: Sequence[Tensor],
    sinks: Sequence[Tensor],
    layers: Sequence[str],
    grid: tuple[int, int],
) -> Image.Image:
    """Draw the attention maps of some layers over images.

    The colours go from grey at the minimum of a map over red to yellow at its maximum. Each panel states the maximum in
    units of the uniform share. Frames mark tokens that are sinks.

    Args:
        images: Images as the backbone saw them.
        maps: Map of each layer for these images, (n, N), row by row of the grid.
        sinks: Sinks of each layer, bool (n, N).
        layers: Names of the layers.
        grid: Height and width of the grid of patches.
    """
    rows = []
    for number, image in enumerate(images):
        factor = max(1.0, _PANEL / max(image.size))
        picture = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        panels = [picture]
        for layer, values, marked in zip(layers, maps, sinks, strict=True):
            panels.append(_panel(picture, values[number], marked[number], grid, layer))
        rows.append(panels)
    width, height = rows[0][0].size
    columns = len(rows[0])
    size = (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    for y, panels in enumerate(rows):
        for x, panel in enumerate(panels):
            sheet.paste(panel, (x * (width + _GAP), y * (height + _GAP)))
    return sheet


def _panel(picture: Image.Image, values: Tensor, marked: Tensor, grid: tuple[int, int], layer: str) -> Image.Image:
    shares = values.float().numpy()
    low, high = float(shares.min()), float(shares.max())
    scaled = ((shares - low) / max(high - low, 1e-12)).reshape(grid).astype(np.float32)
    heat = np.asarray(Image.fromarray(scaled).resize(picture.size, Image.Resampling.NEAREST))[:, :, None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[:, :, None]
    colours = 255 * np.clip(2 * heat - np.arange(3), 0, 1)
    panel = Image.fromarray(((1 - _OPACITY * heat) * grey + _OPACITY * heat * colours).round().astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    across, down = picture.width / grid[1], picture.height / grid[0]
    for index in marked.nonzero().flatten().tolist():
        x, y = index % grid[1] * across, index // grid[1] * down
        draw.rectangle((x, y, x + across - 1, y + down - 1), outline=_FRAME)
    words = f"{layer}: {high / max(float(shares.sum()), 1e-12) * len(shares):.1f} x"
    draw.text((3, 1), words, "white", stroke_width=1, stroke_fill="black")
    return panel
