"""Contact sheets: search results as one image or one HTML page, and groups of duplicates as a page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from visionattn.errors import VisionAttnError, shorten
from visionattn.search.building import read_upright
from visionattn.search.image_index import Hit

__all__ = ["PAGE", "SHOWN", "Cell", "contact_sheet", "page"]

THUMBNAIL, CAPTION, GAP, COLUMNS = 180, 36, 8, 6  # pixels, and images per row
SHOWN = 75 * COLUMNS - 1  # hits next to the query: a side of a WebP image is limited to 16,383 pixels
PAGE = ".html"
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 12px; padding: 0; margin: 0; }
li { list-style: none; background: #f4f4f4; padding: 6px; }
li div { height: 150px; display: flex; align-items: center; justify-content: center; background: #fff; }
img { max-width: 100%; max-height: 100%; } i { color: #666; } p, h2 { margin: .6em 0; } h2 { font-size: 17px; }
span { display: block; font-size: 12px; overflow-wrap: anywhere; }
"""


class Cell(NamedTuple):
    """An image of a page, given by its name in the folder or as an image, and the caption below it."""

    image: str | Image.Image
    words: str


def page(title: str, told: Sequence[str], groups: Mapping[str, Sequence[Cell]], folder: Path) -> str:
    """Build a self-contained HTML page of grouped images, with embedded thumbnails and without scripts.

    Args:
        title: Title of the page.
        told: Paragraphs below the title.
        groups: Heading and images of each group. The first 449 images are drawn; of the others only the names are
            shown.
        folder: Folder of the images; a missing image is marked as unreadable.

    Returns:
        The HTML text.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(words)}</p>" for words in told)]
    left = SHOWN + 1
    for heading, cells in groups.items():
        body.append(f"<h2>{html.escape(heading)}</h2><ul>")
        body += [_item(cell, folder, drawn=number < left) for number, cell in enumerate(cells)]
        body.append("</ul>")
        left -= len(cells)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _item(cell: Cell, folder: Path, drawn: bool) -> str:
    name = shorten(cell.image, 200) if isinstance(cell.image, str) else ""
    shown = ""
    if drawn:
        try:
            image = read_upright(folder / cell.image) if isinstance(cell.image, str) else cell.image
            with io.BytesIO() as file:
                _thumbnail(image).convert("RGB").save(file, "JPEG", quality=85)
                data = base64.b64encode(file.getvalue()).decode()
            shown = f'<div><img alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}"></div>'
        except VisionAttnError:
            shown = "<div><i>cannot be read</i></div>"
    return f"<li>{shown}<span>{html.escape(cell.words)}</span><span>{html.escape(name)}</span></li>"


def contact_sheet(query: Image.Image, hits: Sequence[Hit], folder: Path) -> Image.Image:
    """Draw the query, framed, and the first 449 hits, best first, as one image; missing images are grey.

    Args:
        query: The query image.
        hits: Hits of a search, best first.
        folder: Folder of the indexed images.
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
