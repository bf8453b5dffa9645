"""The rows of `results.csv`: one number each, with what it depends on. They are also how an arena goes on."""

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
    """What is measured at once: a task, a mixer, a seed, and what their numbers depend on."""

    task: str
    mixer: str
    seed: int
    recipe: str
    device: str


@dataclass(frozen=True)
class Row:
    """A number.

    Attributes:
        task: Of the arena.
        mixer: Its name.
        seed: Of parameters and batches.
        measure: What was measured.
        setting: The condition, such as `K=16`.
        value: The number.
        recipe: Sizes of training and tests.
        device: Name of the processor or GPU.
        threads: Of PyTorch.
        torch: Its version.
        visionattn: The package's version.
        seconds: That the cell took, with all of its numbers.
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
    """Rows of a file, and the number of those that are damaged; none where there is no file.

    All rows of a cell that a damaged row may belong to are left out, since a cell is measured as a whole.

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
    # The rows of a cell lie together: a damaged one belongs to the cell before it or behind it.
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
    """Write all rows, whole or not at all.

    Raises:
        StorageError: The file could not be written.
    """
    write_table([asdict(row) for row in rows], path)
