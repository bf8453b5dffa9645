"""Rows of `results.csv`: one number each, with what it depends on. An interrupted arena resumes from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from visionattn.files import read_text
from visionattn.page import write_table

__all__ = ["Cell", "Row", "read_rows", "write_rows"]


class Cell(NamedTuple):
    """Unit of measurement: a task, a mixer, a seed, and what their numbers depend on."""

    task: str
    mixer: str
    seed: int
    recipe: str
    device: str


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        task: Task of the arena.
        mixer: Name of the mixer.
        seed: Seed of parameters and batches.
        measure: What was measured.
        setting: The condition, such as `K=16`.
        value: The number.
        recipe: Sizes of training and tests.
        device: Name of the processor or GPU.
        threads: Number of PyTorch threads.
        torch: Version of PyTorch.
        visionattn: Version of this package.
        seconds: Wall time of the whole cell.
    """

    task: str
    mixer: str
    seed: int
    measure: str
    setting: str
    value: float
    recipe: str
    device: str
    threads: int
    torch: str
    visionattn: str
    seconds: float

    @property
    def cell(self) -> Cell:
        """The cell that the row belongs to."""
        return Cell(self.task, self.mixer, self.seed, self.recipe, self.device)


COLUMNS = [field.name for field in fields(Row)]
_NUMBERS = {"seed": int, "value": float, "threads": int, "seconds": float}


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Rows of a file, and the number of damaged rows; no rows if there is no file.

    All rows of a cell to which a damaged row may belong are dropped, since a cell is measured as a whole.

    Raises:
        DataError: The file cannot be read, or is not text.
    """
    if not path.exists():
        return [], 0
    rows: list[Row | None] = []
    seen = set()
    lines = csv.DictReader(read_text(path).splitlines())
    while True:
        try:
            row = _row(next(lines))
        except StopIteration:
            break
        except (KeyError, TypeError, ValueError, csv.Error):
            rows.append(None)
            continue
        number = (row.cell, row.measure, row.setting)
        rows += [row] if number not in seen else [row, None]
        seen.add(number)
    # The rows of a cell are contiguous: a damaged row belongs to the previous or to the next cell.
    doubted = set()
    for way in (rows, rows[::-1]):
        last = None
        for one in way:
            if one is None and last is not None:
                doubted.add(last.cell)
            last = one if one is not None else last
    return [row for row in rows if row is not None and row.cell not in doubted], rows.count(None)


def _row(line: dict[str, str]) -> Row:
    row = Row(**{name: _NUMBERS.get(name, str)(line[name]) for name in COLUMNS})
    if math.isinf(row.value) or (row.task == "cost" and row.setting and not row.setting.removeprefix("N=").isdigit()):
        raise ValueError(row)
    return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, completely or not at all.

    Raises:
        StorageError: The file could not be written.
    """
    write_table([asdict(row) for row in rows], path)
