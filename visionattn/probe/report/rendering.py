"""The files of a probing report: its numbers, and its sections as Markdown and HTML with curves in SVG.

`results.json` has everything, with the command that gives it again; `results.csv` a row a head, those that were not
chosen too. `report.md` and `report.html` have tables, curves and attention maps; the HTML file needs no other.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionattn.files import atomic_path
from visionattn.probe.report.report import Report, head_file, write_head
from visionattn.probe.report.sections import CurvePoint, Section, make_sections

__all__ = ["draw_curves", "write_pages", "write_report", "write_table"]

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
div { overflow-x: auto; } img { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; }
"""


def write_report(report: Report, folder: str | Path) -> None:
    """Write all files but the maps, which lie there already, each whole or not at all.

    Args:
        report: What was found.
        folder: Of the run; heads, maps and curves of an earlier report in it are replaced, or removed.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    for result in report.sweep.chosen:
        write_head(report, result, folder / "heads")
    content, sections = report.to_json(), make_sections(report)
    drawn = write_pages(sections, folder)
    write_table(content["heads"], folder / "results.csv")
    _write(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    heads = [head_file(folder / "heads", report, result) for result in report.sweep.chosen]
    ours = {*heads, *(path.with_suffix(".md") for path in heads), *(folder / file for file, _ in report.maps)}
    ours |= {folder / file for file in drawn}
    for pattern in ("heads/*-layer*.safetensors", "heads/*-layer*.md", "maps/*.jpg", "layers.svg", "few_shot.svg"):
        for path in folder.glob(pattern):
            if path not in ours:
                path.unlink()


def write_pages(sections: Sequence[Section], folder: str | Path) -> list[str]:
    """Write sections as `report.md` and `report.html`, with their curves.

    Args:
        sections: Of the report; their pictures are JPEG files that lie in the folder already.
        folder: Of the report.

    Returns:
        The files of the curves.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    curves = [section.curves for section in sections if section.curves is not None]
    drawn = {file: draw_curves(labels, series, what) for file, labels, series, what in curves}
    for file, svg in drawn.items():
        _write(folder / file, svg)
    _write(folder / "report.md", _markdown(sections))
    _write(folder / "report.html", _html(sections, drawn, folder))
    return list(drawn)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of the same columns as CSV.

    Raises:
        StorageError: The file could not be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def draw_curves(labels: Sequence[str], series: Mapping[str, Sequence[CurvePoint]], what: str) -> str:
    """Draw shares with their intervals as an SVG.

    Args:
        labels: Of the places along x.
        series: Points of each curve.
        what: Is drawn, the words beside the vertical axis.
    """
    left, top, width, height, legend = 56, 12, 440, 260, 150
    ends = [end for points in series.values() for _, value, interval in points for end in (value, *interval)]
    shown = [100 * end for end in ends if math.isfinite(end)] or [0.0, 100.0]  # if all heads diverged
    step = next(step for step in (1, 2, 5, 10, 20) if max(shown) - min(shown) <= 6 * step or step == 20)
    low, high = step * math.floor(min(shown) / step), step * math.ceil(max(shown) / step)
    high = max(high, low + step)

    def across(x: float) -> float:
        return left + width * (x + 0.5) / len(labels)

    def up(share: float) -> float:
        return top + height * (high - 100 * share) / (high - low)

    parts = []
    for tick in range(low, high + 1, step):
        y = up(tick / 100)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
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
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
        # Curves that share their places along x would hide each other's intervals.
        shift = (number - (len(series) - 1) / 2) * min(6, 0.6 * width / len(labels) / len(series))
        drawn = (point for point in points if math.isfinite(point.value))
        places = [(across(point.x) + shift, up(point.value), point.interval) for point in drawn]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        for x, y, interval in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if all(map(math.isfinite, interval)):
                ends_of_bar = f'y1="{up(interval.low):.1f}" y2="{up(interval.high):.1f}"'
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
        for file, caption in section.pictures:
            lines += [f"{caption}:", "", f"![{caption}]({file})", ""]
        if listed:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _html(sections: Sequence[Section], drawn: Mapping[str, str], folder: Path) -> str:
    """One page that needs no other file."""
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
        for file, caption in section.pictures:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            text = html.escape(caption)
            body.append(f'<p>{text}</p><img alt="{text}" src="data:image/jpeg;base64,{data}">')
    title = html.escape(sections[0].title)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return head + "</head><body>\n" + "\n".join(body) + "\n</body></html>\n"
