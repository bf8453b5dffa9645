"""Files of a probing report: its numbers, and its sections as Markdown and HTML with curves in SVG.

`results.json` has everything, with the command that reproduces it; `results.csv` has one row per head, including those
that were not selected. `report.md` and `report.html` have tables, curves and attention maps; the HTML file is
self-contained.
"""

from __future__ import annotations

import json
from pathlib import Path

from visionattn.page import draw_curves, write_pages, write_table, write_text
from visionattn.probe.report.head_files import head_file, write_head
from visionattn.probe.report.predictions import PREDICTIONS, write_predictions
from visionattn.probe.report.report import Report
from visionattn.probe.report.sections import make_sections

__all__ = ["draw_curves", "write_pages", "write_report", "write_table"]


def write_report(report: Report, folder: str | Path) -> None:
    """Write all files except the maps, which were written before, each completely or not at all.

    Args:
        report: The report.
        folder: Folder of the run; heads, maps and curves of an earlier report are replaced or removed.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    for result in report.sweep.chosen:
        write_head(report, result, folder / "heads")
    content = report.to_json()
    drawn = write_pages(make_sections(report), folder)
    write_table(content["heads"], folder / "results.csv")
    if content["classes_of_best"]:
        write_table(content["classes_of_best"], folder / "classes.csv")
        write_predictions(report, folder / PREDICTIONS)
    write_text(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    heads = [head_file(folder / "heads", report, result) for result in report.sweep.chosen]
    ours = {*heads, *(path.with_suffix(".md") for path in heads), *(folder / file for file, _ in report.maps)}
    ours |= {folder / file for file in drawn}
    for pattern in ("heads/*-layer*.safetensors", "heads/*-layer*.md", "maps/*.jpg", "layers.svg", "few_shot.svg"):
        for path in folder.glob(pattern):
            if path not in ours:
                path.unlink()
