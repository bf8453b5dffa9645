"""Short tables of a report (heads, k-NN and pixels) and of a comparison, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from visionattn.probe.comparison import Comparison
from visionattn.probe.heads.banks import Head
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.report.report import LayerNeighbours, Report, percent

__all__ = ["best_heads", "compared_backbones"]


def best_heads(report: Report) -> Table:
    """The best head of each pooling by held-out accuracy, with its test accuracy."""
    reference = report.reference()
    p = {test.other: f"{test.p:.2g}" for test in report.tests()}
    against = "" if reference is None else report.name(reference)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("head", "layer", "test, %", "95 % interval", "parameters", f"p against {against}"):
        table.add_column(title, justify="left" if title in ("head", "layer") else "right", no_wrap=True)
    rows: list[tuple[LayerNeighbours | HeadResult, str, str, Any, int]] = [
        (entry, entry.method, report.layers[entry.layer].name, entry.result.chosen, 0)
        for entry in report.best_neighbours()
    ]
    rows += [(result, result.spec.pooling, result.layer, result.best, _count(result.head)) for result in report.best()]
    for entry, name, layer, score, parameters in rows:
        low, high = (f"{100 * end:.1f}" for end in score.interval) if score else ("–", "–")
        accuracy = percent(score.accuracy) if score else "–"
        last = "" if entry is reference else p.get(report.name(entry), "–")
        table.add_row(name, layer, accuracy, f"{low} to {high}", f"{parameters:,}", last)
    if report.pixels is not None:
        pixel_rows: list[tuple[str, Any, int]] = [
            ("pixels k-NN" + (", standardised" if standardized else ""), result.chosen, 0)
            for standardized, result in report.pixels.neighbours.items()
        ]
        if (linear := report.pixels.linear) is not None:
            pixel_rows.append(("pixels linear", linear.score, linear.parameters))
        for name, score, parameters in pixel_rows:
            low, high = (f"{100 * end:.1f}" for end in score.interval)
            table.add_row(name, "–", percent(score.accuracy), f"{low} to {high}", f"{parameters:,}", "–")
    return table


def compared_backbones(comparison: Comparison) -> Table:
    """One row per backbone, with its best head and its costs."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("backbone", "by", "test, %", "95 % interval", "p, Holm", "k-NN, %", "MACs, G", "ms", "MB"):
        table.add_column(title, justify="left" if title in ("backbone", "by") else "right", no_wrap=True)
    for row in comparison.rows():
        low, high = (f"{100 * row[f'accuracy_{end}']:.1f}" for end in ("low", "high"))
        neighbours, ms = row["neighbours_accuracy"], row["milliseconds"]
        table.add_row(
            row["backbone"],
            row["head"],
            percent(row["accuracy"]),
            f"{low} to {high}",
            "" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            "–" if neighbours is None else percent(neighbours),
            f"{row['macs'] / 1e9:.3g}",
            "–" if ms is None else f"{ms:.3g}",
            f"{row['bytes'] / 1e6:.3g}",
        )
    return table


def _count(head: Head) -> int:
    return sum(parameter.numel() for parameter in head.parameters())
