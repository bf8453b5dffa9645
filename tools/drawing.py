"""A small SVG canvas for the documentation's figures: a white card, readable on light and dark pages and on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

INK, GREY, BLUE, PALE, ORANGE, APRICOT = "#222222", "#666666", "#2e75b6", "#9dc3e6", "#c55a11", "#f9d3b8"
WIDTH = 400  # units of a canvas; a phone shows about 360 pixels
ENLARGED = 1.25  # pixels per unit where there is room
_HEAD = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'


class Canvas:
    """Shapes in the order in which they are drawn, on white."""

    def __init__(self, title: str, height: float) -> None:
        self.height = height
        self.parts = [
            f"<title>{escape(title)}</title>",
            f'<defs>{_HEAD}<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        ]
        self.box(0, 0, WIDTH, height, "#ffffff")

    def box(self, x, y, width, height, fill="none", stroke="none", dash="", line=1.0, round=0.0) -> None:
        """A rectangle; `dash` as in "4 3"."""
        style = f' stroke="{stroke}" stroke-width="{line}"' if stroke != "none" else ""
        style += f' stroke-dasharray="{dash}"' if dash else ""
        style += f' rx="{round}"' if round else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{style}/>')

    def text(self, x, y, words, anchor="start", fill=INK, size=13, bold=False) -> None:
        """A line of text on the baseline y."""
        style = f'font-size="{size}" fill="{fill}"' + (' font-weight="bold"' if bold else "")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {style}>{escape(words)}</text>')

    def label(self, x, y, words, fill=INK, size=13, bold=False) -> None:
        """A line of text centred on x."""
        self.text(x, y, words, "middle", fill, size, bold)

    def line(self, points: Sequence[tuple[float, float]], stroke=INK, width=1.2, dash="", arrow=False) -> None:
        """A line through points, with an arrow head at its end."""
        path = "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in points)
        style = f' stroke-dasharray="{dash}"' if dash else ""
        style += ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{style}/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        self.line(points, arrow=True)

    def dot(self, x, y, radius=3.5, fill=ORANGE) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"/>')

    def photograph(self, x, y, width, height, image: Image.Image) -> None:
        """A picture, stored with two pixels per unit."""
        small = image.convert("RGB").resize((round(2 * width), round(2 * height)), Image.Resampling.LANCZOS)
        self._embed(x, y, width, height, small, "webp", {"quality": 62, "method": 6}, "")

    def heat(self, x, y, width, height, values, low: float | None = None, high: float | None = None) -> None:
        """A map (H, W) in squares, from white at its lowest value to blue at its highest."""
        values = np.asarray(values, dtype=np.float64)
        low, high = (values.min() if low is None else low), (values.max() if high is None else high)
        share = ((values - low) / max(high - low, 1e-12)).clip(0, 1)[..., None]
        pixels = (1 - share) * np.array([255, 255, 255]) + share * np.array([18, 62, 124])
        image = Image.fromarray(pixels.round().astype(np.uint8))
        if image.width > width / 2:
            self.photograph(x, y, width, height, image)
        else:
            self._embed(x, y, width, height, image, "png", {"optimize": True}, ' style="image-rendering:pixelated"')
        self.box(x, y, width, height, stroke=GREY, line=0.8)

    def _embed(self, x, y, width, height, image, kind, options, style) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        data = base64.b64encode(file.getvalue()).decode()
        self.parts.append(
            f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"{style} '
            f'href="data:image/{kind};base64,{data}"/>'
        )

    def write(self, path: Path) -> int:
        """Write the file and return its size in bytes."""
        size = f'width="{WIDTH * ENLARGED:g}" height="{self.height * ENLARGED:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" {size} role="img" '
        text = "\n".join([f'{head}font-family="Helvetica, Arial, sans-serif">', *self.parts, "</svg>", ""])
        path.write_text(text)
        return len(text.encode())
