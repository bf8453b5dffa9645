"""The report of an arena: one page as HTML and Markdown, with curves and Pareto plots; numbers as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import visionattn
from visionattn.arena.choosing import choose
from visionattn.arena.matrix import PATTERNS, has_pattern
from visionattn.arena.nets import CONTROLS, SMALL
from visionattn.arena.recall import GRID, NEAR_PAIRS, TESTED_PAIRS
from visionattn.arena.regression import anchors
from visionattn.arena.results import FAR, MACS, PARAMETERS, RECALL, REGRESSION, Arena, Column
from visionattn.mixers import MIXERS
from visionattn.page import CurvePoint, Curves, Section, write_pages
from visionattn.probe.report.scatter import ScatterPoint, draw_scatter
from visionattn.probe.statistics import Interval

__all__ = ["front", "make_sections", "write_report"]

_CURVES = 9  # colours of a plot


def write_report(arena: Arena) -> None:
    """Write `report.md` and `report.html` with their plots into the folder of the arena.

    Raises:
        StorageError: A file could not be written.
    """
    write_pages(make_sections(arena), arena.folder)


def make_sections(arena: Arena) -> list[Section]:
    """Sections of the report, without those of tasks that were not run."""
    sections = [Section("Comparison of mixers", [_origin(arena)])]
    if chosen := choose(arena):
        sections.append(Section("Which mixer when", chosen))
    if columns := arena.columns():
        sections.append(Section("Tasks", [_spread(arena)], _table(arena, columns)))
    if costs := arena.cost_columns():
        sections.append(Section("Costs of a layer of ViT-Tiny", [_cost_words()], _costs(arena, costs)))
    sections += [*_pareto(arena), *_curves(arena)]
    return [*sections, _matrix(arena), Section("Notes", _notes(arena))]


def _origin(arena: Arena) -> str:
    devices = ", ".join(dict.fromkeys(f"{row.device} ({row.threads} threads)" for row in arena.rows))
    images = arena.images or "the embedded digits"
    seeds = "1 seed" if arena.plan.seeds == 1 else f"{arena.plan.seeds} seeds"
    return (
        f"{len(arena.mixers)} mixers, {seeds}, on {devices}; visionattn {visionattn.__version__}, "
        f"torch {torch.__version__}. Images: {images}. All numbers are in results.csv."
    )


def _spread(arena: Arena) -> str:
    if arena.plan.seeds < 2:
        return "One seed, so that the spread is not known."
    return "Means over seeds, with the lowest and the highest seed in brackets. Controls come first."


def _table(arena: Arena, columns: Sequence[Column]) -> list[list[str]]:
    rows = [[mixer, *(arena.cell(mixer, column) for column in columns)] for mixer in arena.mixers]
    if REGRESSION in columns:
        for anchor, error in anchors(arena.plan.sequences).items():
            rows.append([f"anchor: {anchor}", *(f"{error:.3f}" if c == REGRESSION else "" for c in columns)])
    return [["mixer", *(column.title for column in columns)], *rows]


def _cost_words() -> str:
    return (
        "Median times of inference on one image, paired with softmax; peak memory of a call. Efficiency length: number "
        "of tokens from which the mixer is cheaper, from a parabola fitted to softmax and a line fitted to the mixer; "
        "– if it is not cheaper on the largest grid, or was not measured there."
    )


def _costs(arena: Arena, columns: Sequence[Column]) -> list[list[str]]:
    head = ["mixer", *(column.title for column in columns), "efficiency length, time", "efficiency length, memory"]
    rows = []
    for mixer in arena.mixers:
        lengths = [arena.efficiency_length(mixer, measure) for measure in ("ms", "MiB")]
        words = ["–" if math.isnan(length) else f"{max(length, 0):,.0f}" for length in lengths]
        rows.append([mixer, *(arena.cell(mixer, column) for column in columns), *words])
    return [head, *rows]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether points (cost, value) are on the Pareto front: no other point has a lower cost and a higher value."""
    return [
        not any((c < cost and v >= value) or (c <= cost and v > value) for c, v in points) for cost, value in points
    ]


def _pareto(arena: Arena) -> list[Section]:
    """Plots of quality against cost, at N = 3136 or the largest measured grid below."""
    tokens = [n for n in arena.tokens() if n <= 3136]
    if not tokens:
        return []
    n = tokens[-1]
    sections = []
    for column, measure, file in (
        (RECALL, "ms", "recall_time.svg"),
        (FAR, "MiB", "reach_memory.svg"),
        (PARAMETERS, "ms", "accuracy_time.svg"),
        (MACS, "M MACs", "accuracy_macs.svg"),
    ):
        shown = []
        for number, mixer in enumerate(arena.mixers):
            cost = arena.estimate(mixer, measure, f"N={n}").mean
            found = arena.estimate(mixer, column.measure, column.setting)
            if found.seeds and cost > 0:
                shown.append((mixer, cost, found, number))
        if len(shown) < 2:
            continue
        best = front([(cost, found.mean) for _, cost, found, _ in shown])
        points = [
            ScatterPoint(mixer, cost, found.mean, Interval(found.low, found.high), on_front, number)
            for (mixer, cost, found, number), on_front in zip(shown, best)
        ]
        names = ", ".join(point.name for point in points if point.on_front)
        drawing = draw_scatter(points, f"{measure} at N = {n:,}", f"{column.title}, %")
        words = f"On the Pareto front: {names}. Bars span the lowest to the highest seed."
        sections.append(
            Section(
                f"{column.title[0].upper()}{column.title[1:]} against {measure}", [words], drawings=[(file, drawing)]
            )
        )
    return sections


def _curves(arena: Arena) -> list[Section]:
    pairs = [f"K={k}" for k in TESTED_PAIRS]
    distances = [f"r={r}" for r in range(1, GRID[0])]
    tokens = [f"N={n}" for n in arena.tokens()]
    reach = f"{NEAR_PAIRS} pairs, each at a fixed Chebyshev distance from its query: a step shows the mixer's reach."
    sections = [
        _curve(arena, "Recall by the number of pairs", "", "recall", pairs, "recall, %", "recall_pairs"),
        _curve(arena, "Recall by distance", reach, "recall by distance", distances, "recall, %", "recall_distance"),
        _curve(arena, "Time by the number of tokens", "", "times faster", tokens, "times faster", "time"),
    ]
    return [section for group in sections for section in group]


def _curve(
    arena: Arena, title: str, words: str, measure: str, settings: list[str], what: str, file: str
) -> list[Section]:
    """Plots of up to `_CURVES` mixers each; softmax attention is in all of them."""
    shown = [m for m in arena.mixers if m != "softmax" and any(arena.values(m, measure, s) for s in settings)]
    sections = []
    for number, first in enumerate(range(0, len(shown), _CURVES - 1)):
        series = {}
        for mixer in ("softmax", *shown[first : first + _CURVES - 1]):
            found = [arena.estimate(mixer, measure, setting) for setting in settings]
            series[mixer] = [CurvePoint(x, e.mean, (e.low, e.high)) for x, e in enumerate(found) if e.seeds]
        curves = Curves(f"{file}_{number + 1}.svg", settings, series, what, percent="%" in what)
        sections.append(Section(f"{title}, {number + 1}", [words] if words else [], curves=curves))
    return sections


def _matrix(arena: Arena) -> Section:
    rows = [[m, *("yes" if has_pattern(m, pattern) else "" for pattern in PATTERNS)] for m in arena.mixers]
    return Section("Supported calls", ["Determined by calling each mixer."], [["mixer", *PATTERNS], *rows])


def _notes(arena: Arena) -> list[str]:
    settings = "; ".join(f"{name} {value}" for name, value in SMALL.items() if name in arena.mixers)
    notes = [
        f"Controls: {', '.join(CONTROLS)}.",
        "All mixers are trained with the same learning rate, which was not tuned for any of them.",
        "Intervals of differences are 95 % Student's t intervals over seeds, not corrected for the number of mixers.",
    ]
    if settings:
        notes.append(f"Settings in training that differ from the defaults: {settings}.")
    if left := [name for name in MIXERS if name not in arena.mixers]:
        notes.append(f"Not in this run: {', '.join(left)}.")
    return notes
