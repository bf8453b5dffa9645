"""Comparison of backbones on the same test images: paired tests, costs, and the Pareto front."""

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
LEVEL = 0.05  # significance level, after the correction


@dataclass(frozen=True)
class Judged:
    """A backbone with its report.

    Attributes:
        name: Name in tables.
        report: All numbers, in the form of `Report.to_json`.
        correct: For each head or k-NN, whether it is right on each test image, bool (n,).
    """

    name: str
    report: Mapping[str, Any]
    correct: Mapping[str, np.ndarray]

    @property
    def best(self) -> str:
        """The head or k-NN with the highest held-out accuracy."""
        return self.report["best"]

    @property
    def best_neighbours(self) -> str | None:
        """The k-NN with the highest held-out accuracy."""
        found = [one for one in self.report["answers"] if one["name"].startswith("k-NN")]
        return max(found, key=lambda one: one["held_out_accuracy"] or 0, default={"name": None})["name"]

    def accuracy(self, method: str) -> tuple[float, Interval]:
        """Test accuracy of a head or k-NN, with Wilson's 95 % interval."""
        correct = self.correct[method]
        return float(correct.mean()), wilson_interval(int(correct.sum()), len(correct))


class PairedDifference(NamedTuple):
    """Difference between two backbones on the same test images.

    Attributes:
        one: Name of the first backbone.
        other: Name of the second backbone.
        difference: Accuracy of the first minus that of the second.
        interval: 95 % interval of the difference, bootstrapped over images.
        p: P value of McNemar's exact test.
        p_holm: P value after Holm's correction for the number of pairs.
    """

    one: str
    other: str
    difference: float
    interval: Interval
    p: float
    p_holm: float


def pareto_front(costs: Sequence[float | None], values: Sequence[float]) -> list[bool]:
    """Whether entries are on the Pareto front: no other has at most the same cost and a higher value, or the reverse.

    Args:
        costs: Cost of each entry; an entry without a cost is not on the front.
        values: Value of each entry; higher is better.
    """
    points = [(math.inf if cost is None else cost, value) for cost, value in zip(costs, values, strict=True)]
    return [
        cost < math.inf
        and not any((c < cost and v >= value) or (c <= cost and v > value) for c, v in points)
        for cost, value in points
    ]  # fmt: skip


@dataclass(repr=False)
class Comparison:
    """Several backbones that were evaluated on the same test images.

    Attributes:
        judged: The backbones, in the given order.
        timings: Milliseconds per image of each backbone that could be timed, taking turns.
        device: Device on which they were timed.
        notes: Notes for the reader.
        folder: Folder of the comparison; None if it was not written.
    """

    judged: list[Judged]
    timings: dict[str, Timing] = field(default_factory=dict)
    device: str = ""
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __post_init__(self) -> None:
        if len(self.judged) < 2:
            raise InputError(f"A comparison requires at least two backbones; got {len(self.judged)}.")
        first = self.judged[0].report
        for one in self.judged[1:]:
            if one.report["plan"] == first["plan"] and one.report["plan"]:
                raise InputError(f"{shorten(one.name)} is given twice.")
            if one.report["data"]["test_digest"] != first["data"]["test_digest"]:
                raise InputError(
                    f"{shorten(one.name)} and {shorten(self.judged[0].name)} have different test images; paired tests "
                    "require the same ones. Probe both with the same --data."
                )
            if one.report["data"]["train_digest"] != first["data"]["train_digest"]:
                self.notes.append(f"{one.name} and {self.judged[0].name} have different training images.")
            lengths = {len(correct) for each in (one, self.judged[0]) for correct in each.correct.values()}
            if len(lengths) != 1:
                raise InputError(f"{shorten(one.name)} has another number of readable test images than the others.")

    def __repr__(self) -> str:
        return f"Comparison({self.summary()})"

    @property
    def data(self) -> Mapping[str, Any]:
        """Data facts of the first report."""
        return self.judged[0].report["data"]

    @property
    def plan(self) -> str:
        """Hash of the reports."""
        return hashlib.sha256(" ".join(sorted(one.report["plan"] for one in self.judged)).encode()).hexdigest()

    @property
    def leader(self) -> Judged:
        """The backbone with the highest test accuracy; ties: the first."""
        return max(self.judged, key=lambda one: one.accuracy(one.best)[0])

    def tests(self, neighbours: bool = False) -> list[PairedDifference]:
        """Paired difference of each pair of backbones.

        Args:
            neighbours: Compare the best k-NN of each backbone instead of its best method.
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
        """Difference of each other backbone from the leader; p is corrected for all pairs."""
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
        """One row per backbone, in the given order; unknown values are None."""
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
        """The result in one line."""
        leader, behind = self.leader, self.against_leader()
        accuracy, interval = leader.accuracy(leader.best)
        words = f"{leader.name} is right most often, {percent(accuracy, interval)} % by {leader.best}"
        close = [name for name, test in behind.items() if test.p_holm >= LEVEL]
        if not close:
            return f"{words}; all others are significantly worse (p < {LEVEL:g} after Holm's correction)."
        return f"{words}; {_listed(close)} did not differ significantly (p >= {LEVEL:g} after Holm's correction)."

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
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
