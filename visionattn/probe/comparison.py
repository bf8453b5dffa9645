"""Backbones that were judged on the same test images, side by side: paired tests, costs, and which are on the front."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionattn.errors import InputError, shorten
from visionattn.probe.costs import Timing
from visionattn.probe.report.report import percent, plain
from visionattn.probe.statistics import (
    Interval,
    bootstrap_interval,
    holm_correction,
    mcnemar_test,
    wilson_interval,
)

__all__ = ["Comparison", "Judged", "PairedDifference", "pareto_front"]

COSTS = ("macs", "milliseconds")
LEVEL = 0.05  # of a test, after the correction


@dataclass(frozen=True)
class Judged:
    """A backbone with its report.

    Attributes:
        name: As tables call it.
        report: All numbers, as `Report.to_json` gives them.
        correct: Of each head or k-NN whether it is right on each test image, bool (n,).
    """

    name: str
    report: Mapping[str, Any]
    correct: Mapping[str, np.ndarray]

    @property
    def best(self) -> str:
        """The head or k-NN that the held-out images prefer."""
        return self.report["best"]

    @property
    def best_neighbours(self) -> str | None:
        """The k-NN that the held-out images prefer."""
        found = [one for one in self.report["answers"] if one["name"].startswith("k-NN")]
        return max(found, key=lambda one: one["held_out_accuracy"] or 0, default={"name": None})["name"]

    def accuracy(self, method: str) -> tuple[float, Interval]:
        """Of a head or k-NN on the test images, with Wilson's 95 % interval."""
        correct = self.correct[method]
        return float(correct.mean()), wilson_interval(int(correct.sum()), len(correct))


class PairedDifference(NamedTuple):
    """Two backbones on the same test images.

    Attributes:
        one: Name of the one.
        other: Name of the other.
        difference: Accuracy of the one less the other's.
        interval: Of the difference, bootstrapped over images, 95 %.
        p: Of McNemar's exact test.
        p_holm: The same after Holm's correction for the number of pairs.
    """

    one: str
    other: str
    difference: float
    interval: Interval
    p: float
    p_holm: float


def pareto_front(costs: Sequence[float | None], values: Sequence[float]) -> list[bool]:
    """Which of several are on the front: no other costs less and is worth as much, or costs as much and is worth more.

    Args:
        costs: Of each; one without a cost is not on the front.
        values: Of each, the larger the better.
    """
    points = [(math.inf if cost is None else cost, value) for cost, value in zip(costs, values, strict=True)]
    return [
        cost < math.inf
        and not any((c < cost and v >= value) or (c <= cost and v > value) for c, v in points)
        for cost, value in points
    ]  # fmt: skip


@dataclass(repr=False)
class Comparison:
    """Several backbones that were judged on the same test images.

    Attributes:
        judged: The backbones, in the order given.
        timings: Milliseconds of an image of each that could be timed, in turns.
        device: On which they were timed.
        notes: In words.
        folder: Where it was written; None where it was not.
    """

    judged: list[Judged]
    timings: dict[str, Timing] = field(default_factory=dict)
    device: str = ""
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __post_init__(self) -> None:
        if len(self.judged) < 2:
            raise InputError(f"A comparison needs at least two backbones; got {len(self.judged)}.")
        first = self.judged[0].report
        for one in self.judged[1:]:
            if one.report["plan"] == first["plan"] and one.report["plan"]:
                raise InputError(f"{shorten(one.name)} is given twice.")
            if one.report["data"]["test_digest"] != first["data"]["test_digest"]:
                raise InputError(
                    f"{shorten(one.name)} was judged on other test images than {shorten(self.judged[0].name)}: paired "
                    "tests need the same ones. Probe both with the same --data."
                )
            if one.report["data"]["train_digest"] != first["data"]["train_digest"]:
                self.notes.append(f"{one.name} has other training images than {self.judged[0].name}.")
            lengths = {len(correct) for each in (one, self.judged[0]) for correct in each.correct.values()}
            if len(lengths) != 1:
                raise InputError(f"{shorten(one.name)} could not read as many test images as the others.")

    def __repr__(self) -> str:
        return f"Comparison({self.summary()})"

    @property
    def data(self) -> Mapping[str, Any]:
        """What the first report says of the data."""
        return self.judged[0].report["data"]

    @property
    def plan(self) -> str:
        """Hash of the reports."""
        return hashlib.sha256(" ".join(sorted(one.report["plan"] for one in self.judged)).encode()).hexdigest()

    @property
    def leader(self) -> Judged:
        """The backbone with the highest test accuracy, the first of equals."""
        return max(self.judged, key=lambda one: one.accuracy(one.best)[0])

    def tests(self, neighbours: bool = False) -> list[PairedDifference]:
        """Each pair of backbones on the same test images.

        Args:
            neighbours: Compare the best k-NN of each, whatever does best.
        """
        chosen = {one.name: one.best_neighbours if neighbours else one.best for one in self.judged}
        correct = {one.name: one.correct[method] for one in self.judged if (method := chosen[one.name]) is not None}
        pairs = list(itertools.combinations(correct, 2))
        p = [mcnemar_test(correct[one], correct[other]) for one, other in pairs]
        found = []
        for (one, other), raw, holm in zip(pairs, p, holm_correction(p)):
            scores = correct[one].astype(float) - correct[other]
            interval = bootstrap_interval(scores) if len(scores) > 1 else Interval(math.nan, math.nan)
            found.append(PairedDifference(one, other, float(scores.mean()), interval, raw, holm))
        return found

    def against_leader(self) -> dict[str, PairedDifference]:
        """Each backbone but the leader, less the leader; p is corrected for all pairs."""
        found, leader = {}, self.leader.name
        for test in self.tests():
            if test.other == leader:
                found[test.one] = test
            elif test.one == leader:
                low, high = test.interval
                found[test.other] = PairedDifference(
                    test.other, leader, 0.0 - test.difference, Interval(0.0 - high, 0.0 - low), test.p, test.p_holm
                )
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row a backbone, as they were given; what is not known is None."""
        behind = self.against_leader()
        rows: list[dict[str, Any]] = []
        for one in self.judged:
            accuracy, interval = one.accuracy(one.best)
            backbone, timing = one.report["backbone"], self.timings.get(one.name)
            neighbours, test = one.best_neighbours, behind.get(one.name)
            rows.append(
                {
                    "backbone": one.name,
                    "weights": backbone["weights"],
                    "sha256": backbone["sha256"],
                    "head": one.best,
                    "accuracy": accuracy,
                    "accuracy_low": interval.low,
                    "accuracy_high": interval.high,
                    "neighbours": neighbours,
                    "neighbours_accuracy": None if neighbours is None else one.accuracy(neighbours)[0],
                    "difference": None if test is None else test.difference,
                    "difference_low": None if test is None else test.interval.low,
                    "difference_high": None if test is None else test.interval.high,
                    "p": None if test is None else test.p,
                    "p_holm": None if test is None else test.p_holm,
                    "image_size": one.report["data"]["image_size"],
                    "macs": backbone["macs"],
                    "parameters": backbone["parameters"],
                    "bytes": backbone["bytes"],
                    "milliseconds": None if timing is None else timing.median,
                    "milliseconds_low": None if timing is None else timing.low,
                    "milliseconds_high": None if timing is None else timing.high,
                    "device": None if timing is None else self.device,
                }
            )
        for cost in COSTS:
            front = pareto_front([row[cost] for row in rows], [row["accuracy"] for row in rows])
            for row, member in zip(rows, front):
                row[f"front_{cost}"] = member
        return rows

    def summary(self) -> str:
        """The result in a line."""
        leader, behind = self.leader, self.against_leader()
        accuracy, interval = leader.accuracy(leader.best)
        words = f"{leader.name} is right most often, {percent(accuracy, interval)} % by {leader.best}"
        close = [name for name, test in behind.items() if test.p_holm >= LEVEL]
        if not close:
            return f"{words}; each other is behind it (p < {LEVEL:g} after Holm's correction)."
        return f"{words}; {_listed(close)} cannot be told from it (p of {LEVEL:g} or more after Holm's correction)."

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return plain(
            {
                "kind": "comparison",
                "plan": self.plan,
                "data": self.data,
                "summary": self.summary(),
                "backbones": self.rows(),
                "methods": {
                    one.name: {method: float(correct.mean()) for method, correct in one.correct.items()}
                    for one in self.judged
                },
                "tests": [test._asdict() for test in self.tests()],
                "tests_neighbours": [test._asdict() for test in self.tests(neighbours=True)],
                "timings": {name: timing._asdict() for name, timing in self.timings.items()},
                "device": self.device,
                "commands": {one.name: one.report["command"] for one in self.judged},
                "notes": self.notes,
            }
        )

    def _repr_html_(self) -> str:
        cells = [
            (row["backbone"], row["head"], percent(row["accuracy"], (row["accuracy_low"], row["accuracy_high"])))
            for row in self.rows()
        ]
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        head = "<tr><th>backbone</th><th>head</th><th>test accuracy, % [95 %]</th></tr>"
        return f"<table>{head}{rows}</table><p>{escape(self.summary())}</p>"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
