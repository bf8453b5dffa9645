"""The contact sheet of a search: the query and what was found, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from visionattn.errors import VisionAttnError, shorten
from visionattn.search.building import read_upright
from visionattn.search.image_index import Hit

__all__ = ["SHOWN", "contact_sheet"]

THUMBNAIL, CAPTION, GAP, COLUMNS = 180, 36, 8, 6  # pixels, and images per row
SHOWN = 75 * COLUMNS - 1  # hits next to the query: WebP ends at 16,383 pixels


def contact_sheet(query: Image.Image, hits: Sequence[Hit], folder: Path) -> Image.Image:
    """Draw the query, framed, and the first 449 hits, best first; grey stands for an image that is gone.

    Args:
        query: The query image.
        hits: What was found.
        folder: Where the indexed images are.
    """
    cells = [(_thumbnail(query), "query")]
    for hit in hits[:SHOWN]:
        try:
            image = _thumbnail(read_upright(folder / hit.image))
        except VisionAttnError:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
        cells.append((image, f"{hit.score:.3f}  {shorten(Path(hit.image).name)}"))
    columns = min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for number, (thumbnail, caption) in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        sheet.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + (THUMBNAIL - thumbnail.height) // 2))
        if number == 0:
            draw.rectangle((left - 3, top - 3, left + THUMBNAIL + 2, top + THUMBNAIL + 2), outline="black", width=3)
        while draw.textlength(caption, font) > THUMBNAIL and len(caption) > 1:
            caption = caption[:-1]
        draw.text((left, top + THUMBNAIL + 6), caption, fill="black", font=font)
    return sheet


def _thumbnail(image: Image.Image) -> Image.Image:
    share = THUMBNAIL / max(image.size)
    return image.resize((max(1, round(share * image.width)), max(1, round(share * image.height))))
