"""Report pages: sections of text, tables, curves and images, written as Markdown and as one HTML file.

The HTML file has no scripts and no external references: curves are inline SVG, images are base64.
"""

from __future__ import annotations

import base64
import csv
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from visionattn.files import atomic_path

__all__ = ["COLOURS", "CurvePoint", "Curves", "Section", "draw_curves", "write_pages", "write_table", "write_text"]

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2, p { overflow-wrap: anywhere; }
table { border-spacing: 0; font-size: 14px; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff padding-box; }
div { overflow-x: auto; } img { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; }
"""


class CurvePoint(NamedTuple):
    """A position along x, and a value with the ends of its interval; NaN is not drawn."""

    x: int
    value: float
    interval: tuple[float, float] = (math.nan, math.nan)


class Curves(NamedTuple):
    """A plot of values with their intervals.

    Attributes:
        file: Output file.
        labels: Labels of the positions along x.
        series: Points of each curve.
        what: Label of the vertical axis.
        percent: The values are fractions, shown in percent.
    """

    file: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[CurvePoint]]
    what: str
    percent: bool = True


class Section(NamedTuple):
    """A heading and the content below it, in this order."""

    title: str
    words: list[str] = []  # noqa: RUF012
    table: list[list[str]] = []  # noqa: RUF012, the first row is the header
    curves: Curves | None = None
    pictures: list[tuple[str, str]] = []  # noqa: RUF012, files and captions
    drawings: list[tuple[str, str]] = []  # noqa: RUF012, files and what they hold, SVG


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        StorageError: The file could not be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same columns as CSV.

    Raises:
        StorageError: The file could not be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_pages(sections: Sequence[Section], folder: str | Path, name: str = "report") -> list[str]:
    """Write sections as `report.md` and `report.html`, with their curves and images.

    Args:
        sections: Sections of the report; their images are JPEG or PNG files already in the folder.
        folder: Folder of the report.
        name: Name of the two files, without suffix.

    Returns:
        The files of the curves.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    curves = [section.curves for section in sections if section.curves is not None]
    drawn = {file: draw_curves(labels, series, what, percent) for file, labels, series, what, percent in curves}
    for file, svg in (*drawn.items(), *(drawing for section in sections for drawing in section.drawings)):
        write_text(folder / file, svg)
    write_text(folder / f"{name}.md", _markdown(sections))
    write_text(folder / f"{name}.html", _html(sections, drawn, folder))
    return list(drawn)


def _ticks(values: Sequence[float], finest: float) -> list[float]:
    """Up to eight numbers around all values, in steps of 1, 2 or 5 times a power of ten."""
    span = max(max(values) - min(values), finest)
    power = 10.0 ** math.floor(math.log10(span) - 1)
    step = next(step for factor in (1, 2, 5, 10, 20) if span <= 6 * (step := factor * power) and step >= finest)
    low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [step * number for number in range(low, max(high, low + 1) + 1)]


def draw_curves(
    labels: Sequence[str], series: Mapping[str, Sequence[CurvePoint]], what: str, percent: bool = True
) -> str:
    """Draw values with their intervals as an SVG.

    Args:
        labels: Labels of the positions along x.
        series: Points of each curve.
        what: Label of the vertical axis.
        percent: The values are fractions, shown in percent.
    """
    left, top, width, height, legend = 56, 12, 440, 260, 150
    scale = 100 if percent else 1
    ends = [end for points in series.values() for _, value, interval in points for end in (value, *interval)]
    ticks = _ticks([scale * end for end in ends if math.isfinite(end)] or [0.0, 100.0], 1.0 if percent else 1e-6)
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return left + width * (x + 0.5) / len(labels)

    def up(value: float) -> float:
        return top + height * (high - scale * value) / (high - low)

    parts = []
    for tick in ticks:
        y = up(tick / scale)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    every = math.ceil(8 * max(map(len, labels)) / (width / len(labels)))  # a letter takes up to 8 pixels
    for number, label in enumerate(labels):
        if (len(labels) - 1 - number) % every == 0:
            x = across(number)
            parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{html.escape(label)}</text>')
    middle = top + height / 2
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(what)}</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        # Curves with the same positions along x would hide each other's intervals.
        shift = (number - (len(series) - 1) / 2) * min(6, 0.6 * width / len(labels) / len(series))
        drawn = (point for point in points if math.isfinite(point.value))
        places = [(across(point.x) + shift, up(point.value), point.interval) for point in drawn]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        for x, y, interval in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if all(map(math.isfinite, interval)):
                ends_of_bar = f'y1="{up(interval[0]):.1f}" y2="{up(interval[1]):.1f}"'
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends_of_bar} stroke="{colour}"/>')
        y = top + 14 + 16 * number
        parts.append(f'<rect x="{left + width + 12}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 30}" y="{y}">{html.escape(name)}</text>')
    size = f'width="{left + width + legend}" height="{max(top + height + 30, top + 16 * len(series) + 20)}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {style}>' + "".join(parts) + "</svg>"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(sections: Iterable[Section]) -> str:
    lines: list[str] = []
    for number, section in enumerate(sections):
        lines += [f"{'##' if number else '#'} {section.title}", ""]
        listed = section.title == "Notes"
        for words in section.words:
            lines += [f"- {words}"] if listed else [words, ""]
        if section.table:
            header, *rows = section.table
            lines += ["| " + " | ".join(map(_cell, header)) + " |", "|" + " --- |" * len(header)]
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
            lines.append("")
        if section.curves is not None:
            lines += [f"![{section.title}]({section.curves.file})", ""]
        for file, _ in section.drawings:
            lines += [f"![{section.title}]({file})", ""]
        for file, caption in section.pictures:
            lines += [f"{caption}:", "", f"![{caption}]({file})", ""]
        if listed:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _html(sections: Sequence[Section], drawn: Mapping[str, str], folder: Path) -> str:
    """A self-contained page."""
    body: list[str] = []
    for number, section in enumerate(sections):
        level = "h2" if number else "h1"
        body.append(f"<{level}>{html.escape(section.title)}</{level}>")
        for words in section.words:
            text = html.escape(words)
            code = len(words) > 1 and words[0] == words[-1] == "`"
            body.append(f"<p><code>{text[1:-1]}</code></p>" if code else f"<p>{text}</p>")
        if section.table:
            header, *rows = section.table
            body.append("<div><table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>")
            for row in rows:
                body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
            body.append("</table></div>")
        if section.curves is not None:
            body.append(f"<div>{drawn[section.curves.file]}</div>")
        body += [f"<div>{svg}</div>" for _, svg in section.drawings]
        for file, caption in section.pictures:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            text = html.escape(caption)
            kind = "png" if file.endswith(".png") else "jpeg"
            body.append(f'<p>{text}</p><img alt="{text}" src="data:image/{kind};base64,{data}">')
    title = html.escape(sections[0].title)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_VIEWPORT}<title>{title}</title>'
    return head + f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
