"""Scatter plot of accuracy, or another share, against cost as an SVG, with the Pareto front."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from visionattn.page import COLOURS
from visionattn.probe.statistics import Interval

__all__ = ["ScatterPoint", "draw_scatter"]

_LETTER = 6.6  # width of a character in pixels


class ScatterPoint(NamedTuple):
    """A backbone.

    Attributes:
        name: Label next to the point.
        cost: Cost, above 0.
        accuracy: Accuracy, from 0 to 1.
        interval: Interval of the accuracy.
        on_front: Whether it is on the Pareto front.
        number: Index of its colour, so that it is the same in several plots.
    """

    name: str
    cost: float
    accuracy: float
    interval: Interval
    on_front: bool
    number: int


def draw_scatter(points: Sequence[ScatterPoint], across: str, up: str = "test accuracy, %") -> str:
    """Draw accuracies against costs on a logarithmic axis.

    Args:
        points: One or more points.
        across: Label of the horizontal axis, the costs.
        up: Label of the vertical axis.
    """
    left, top, width, height = 52, 14, 460, 280
    ends = [100 * end for point in points for end in (*point.interval, point.accuracy) if math.isfinite(end)]
    step = next(step for step in (1, 2, 5, 10, 20) if max(ends) - min(ends) <= 6 * step or step == 20)
    low, high = step * math.floor(min(ends) / step), step * math.ceil(max(ends) / step)
    high = max(high, low + step)
    logs = [math.log10(point.cost) for point in points]
    margin = max(0.12, 0.12 * (max(logs) - min(logs)))
    first, last = min(logs) - margin, max(logs) + margin

    def x_of(cost: float) -> float:
        return left + width * (math.log10(cost) - first) / (last - first)

    def y_of(share: float) -> float:
        return top + height * (high - 100 * share) / (high - low)

    parts = []
    for tick in range(low, high + 1, step):
        y = y_of(tick / 100)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for cost in _ticks(first, last):
        x = x_of(cost)
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{cost:g}</text>')
    middle = left + width / 2
    parts.append(f'<text x="{middle:.0f}" y="{top + height + 38}" text-anchor="middle">{html.escape(across)}</text>')
    turned = f"translate(14 {top + height / 2:.0f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{html.escape(up)}</text>')
    front = sorted((point.cost, point.accuracy) for point in points if point.on_front)
    line = " ".join(f"{x_of(cost):.1f},{y_of(accuracy):.1f}" for cost, accuracy in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    taken: list[tuple[float, float, float]] = []  # occupied by names: left and right end, and height
    for point in sorted(points, key=lambda point: point.accuracy, reverse=True):
        colour = COLOURS[point.number % len(COLOURS)]
        x, y = x_of(point.cost), y_of(point.accuracy)
        if all(map(math.isfinite, point.interval)):
            bar = f'y1="{y_of(point.interval.low):.1f}" y2="{y_of(point.interval.high):.1f}"'
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {bar} stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
        length = _LETTER * len(point.name)
        start = x + 9 if x + 9 + length < left + width else max(left + 2, x - 9 - length)
        # The line rises to the right of a point, above its name.
        row = y + 12 if point.on_front and start > x else y - 7
        while any(abs(row - other) < 14 and start < end and begin < start + length for begin, end, other in taken):
            row += 14
        taken.append((start, start + length, row))
        name = html.escape(point.name)
        parts.append(f'<text x="{start:.1f}" y="{row + 4:.1f}" fill="{colour}">{name}</text>')
    size = f'viewBox="0 0 {left + width + 8} {top + height + 46}" width="{left + width + 8}"'
    style = 'style="max-width: 100%; height: auto" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {style}>' + "".join(parts) + "</svg>"


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers for the ticks of a logarithmic axis, at least two if possible."""
    decades = range(math.floor(first), math.ceil(last) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)), tuple(n / 10 for n in range(10, 100))):
        found = [digit * 10.0**power for power in decades for digit in digits]
        found = [float(f"{tick:.6g}") for tick in found if first <= math.log10(tick) <= last]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 8)]
