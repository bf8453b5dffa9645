"""Sizes of an arena's run, and the results of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["FULL", "QUICK", "Found", "Plan"]


class Found(NamedTuple):
    """One number: what was measured, under which condition, and its value."""

    measure: str
    setting: str
    value: float


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, the same for all mixers.

    Attributes:
        recall_steps: Training steps of each form of recall.
        regression_steps: Training steps of in-context regression.
        epochs: Epochs of training on images.
        tests: Number of grids in a test of recall.
        sequences: Number of sequences in a test of regression.
        rounds: Rounds of timing.
        slowest: Longest call that is timed, in seconds; larger grids are skipped.
        sides: Sides of the square grids on which costs are measured.
        seeds: Number of training seeds.
    """

    recall_steps: int = 250
    regression_steps: int = 500
    epochs: int = 8
    tests: int = 500
    sequences: int = 8000
    rounds: int = 5
    slowest: float = 4.0
    sides: Sequence[int] = (14, 20, 28, 40, 56, 128)
    seeds: int = 3

    def recipe(self, task: str) -> str:
        """Text of the column `recipe`: the sizes that the numbers of a task depend on."""
        sizes = {
            "recall": f"{self.recall_steps} steps; {self.tests} tests",
            "regression": f"{self.regression_steps} steps; {self.sequences} sequences",
            "cost": f"{self.rounds} rounds; grids {' '.join(map(str, self.sides))}",
            "accuracy": f"{self.epochs} epochs",
        }
        return sizes[task]


FULL = Plan()
QUICK = Plan(150, 200, 3, 200, 4000, 3, 0.5, (14, 28, 56), 1)
