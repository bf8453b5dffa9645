"""Results of an arena: estimates over seeds, differences from softmax attention, and the table of all mixers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from visionattn.arena.cost import efficiency_length
from visionattn.arena.plan import Plan
from visionattn.arena.rows import Row
from visionattn.probe.statistics import Interval, t_interval

__all__ = ["COLUMNS", "Arena", "Column", "Estimate"]


class Estimate(NamedTuple):
    """Mean over seeds, with the lowest and the highest value; NaN if nothing was measured."""

    mean: float
    low: float
    high: float
    seeds: int


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: Heading of the column.
        measure: Measure of its rows.
        setting: Setting of its rows.
        form: Format of the numbers.
        higher: Whether higher is better; None: neither.
    """

    title: str
    measure: str
    setting: str
    form: str
    higher: bool | None


RECALL = Column("recall, K = 16", "recall", "K=16", ".3f", True)
FAR = Column("recall, distance 7", "recall by distance", "r=7", ".3f", True)
LARGER = Column("recall, larger grid, K = 64", "recall on a larger grid", "K=64", ".3f", True)
DISCRETE = Column("discrete recall", "discrete recall", "K=16", ".3f", True)
CROSS = Column("cross recall", "cross recall", "K=16", ".3f", True)
REGRESSION = Column("regression error", "regression error", "L=40", ".3f", False)
LONGER = Column("regression error, L = 80", "regression error", "L=80", ".3f", False)
PARAMETERS = Column("accuracy, equal parameters", "accuracy", "equal parameters", ".3f", True)
MACS = Column("accuracy, equal MACs", "accuracy", "equal MACs", ".3f", True)
COLUMNS = (RECALL, FAR, LARGER, DISCRETE, CROSS, REGRESSION, LONGER, PARAMETERS, MACS)


@dataclass(frozen=True)
class Arena:
    """Results of `visionattn.arena`.

    Attributes:
        folder: Folder of the report.
        mixers: Names of the mixers, the controls first.
        rows: All numbers.
        plan: Sizes of the run.
        images: Folder of images; None: the embedded digits.
    """

    folder: Path
    mixers: list[str]
    rows: list[Row]
    plan: Plan
    images: Path | None

    def values(self, mixer: str, measure: str, setting: str) -> list[float]:
        """The values of a measure, in the order of the seeds."""
        wanted = [row for row in self.rows if (row.mixer, row.measure, row.setting) == (mixer, measure, setting)]
        return [row.value for row in sorted(wanted, key=lambda row: row.seed)]

    def estimate(self, mixer: str, measure: str, setting: str) -> Estimate:
        """Mean and range over seeds."""
        found = self.values(mixer, measure, setting)
        if not found:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return Estimate(float(np.mean(found)), min(found), max(found), len(found))

    def difference(self, mixer: str, column: Column) -> tuple[float, Interval]:
        """Mean difference from softmax attention, paired by seed, and its 95 % interval; NaN for one seed."""
        pairs = [self.values(name, column.measure, column.setting) for name in (mixer, "softmax")]
        if not pairs[0] or len(pairs[0]) != len(pairs[1]):
            return math.nan, Interval(math.nan, math.nan)
        differences = [own - softmax for own, softmax in zip(*pairs)]
        return float(np.mean(differences)), t_interval(differences)

    def tokens(self) -> list[int]:
        """Numbers of tokens at which costs were measured, in increasing order."""
        return sorted(int(row.setting[2:]) for row in self.rows if (row.mixer, row.measure) == ("softmax", "ms"))

    def efficiency_length(self, mixer: str, measure: str) -> float:
        """Number of tokens from which a mixer is cheaper in `"ms"` or `"MiB"`; NaN if it is not on the largest grid.

        Times of softmax attention are those measured in turn with the mixer; memory is measured once.
        """
        tokens = [n for n in self.tokens() if self.values(mixer, measure, f"N={n}")]
        if not tokens or tokens[-1] != self.tokens()[-1] or mixer == "softmax":
            return math.nan
        own = [self.estimate(mixer, measure, f"N={n}").mean for n in tokens]
        beside = (mixer, "ms of softmax") if measure == "ms" else ("softmax", measure)
        dense = [self.estimate(*beside, f"N={n}").mean for n in tokens]
        if own[-1] >= dense[-1]:
            return math.nan
        return efficiency_length(tokens, dense, own, first=int(measure == "ms"))

    def columns(self) -> list[Column]:
        """Columns of the table that have values."""
        return [column for column in COLUMNS if self.values("softmax", column.measure, column.setting)]

    def cost_columns(self, shown: Sequence[int] = (196, 784, 3136, 16384)) -> list[Column]:
        """Columns of cost at some numbers of tokens, or at all measured ones if none of these was measured."""
        tokens = [n for n in self.tokens() if n in shown] or self.tokens()
        found = [Column("own parameters", "own parameters", "", "+,.0f", None)] if tokens else []
        for measure, form, higher in (("M MACs", ",.1f", False), ("ms", ",.2f", False), ("MiB", ",.1f", False)):
            found += [Column(f"{measure}, N = {n}", measure, f"N={n}", form, higher) for n in tokens]
        return [*found, *(Column(f"times faster, N = {n}", "times faster", f"N={n}", ".2f", True) for n in tokens[-1:])]

    def cell(self, mixer: str, column: Column, spread: bool = True) -> str:
        """Text of a table cell: the mean, with the range over seeds; `–` if nothing was measured."""
        found = self.estimate(mixer, column.measure, column.setting)
        if not found.seeds:
            return "–"
        text = format(found.mean, column.form)
        if spread and found.seeds > 1:
            text += f" ({format(found.low, column.form)} to {format(found.high, column.form)})"
        return text

    def table(self) -> Table:
        """A short table for a terminal."""
        columns = [c for c in self.columns() if c not in (DISCRETE, LONGER, CROSS)]
        columns += [c for c in self.cost_columns() if c.measure in ("times faster", "own parameters")]
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("mixer", no_wrap=True)
        for column in columns:
            table.add_column(column.title, justify="right")
        for mixer in self.mixers:
            table.add_row(mixer, *(self.cell(mixer, column, spread=False) for column in columns))
        return table
