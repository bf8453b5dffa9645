"""The order in which a file is compared with its model: cheap sizes first, as far as the time limit allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from visionattn.errors import ExportError
from visionattn.export.budget import Budget, TimeLimitError
from visionattn.export.rows import CheckRow
from visionattn.export.spec import size_text

__all__ = ["Checked", "Schedule"]

# A larger image is estimated to take at most so many times longer than the one before: an image of a few pixels takes
# as long as the calls of all layers, and says little about their work.
MOST_GROWTH = 16.0


class Checked(NamedTuple):
    """The result of a check.

    Attributes:
        rows: The comparisons; all have passed.
        unchecked: The sizes that the time limit left out, such as "320 x 736"; empty after a complete check.
    """

    rows: list[CheckRow]
    unchecked: list[str]


class Schedule:
    """Comparisons at several sizes, in the order of their cost, so that a wrong file fails early.

    The time of a size is estimated from the comparison before, in proportion to the pixels (see `MOST_GROWTH`).

    Args:
        sizes: Heights and widths.
        batches: Batch sizes at each of them.
        budget: The time limit.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batches: Sequence[int], budget: Budget) -> None:
        self.sizes = list(dict.fromkeys((height, width) for height, width in sizes))
        self.batches, self.budget = list(batches), budget
        self._order = sorted(self.sizes, key=math.prod)
        self._seconds, self._pixels = 0.0, 1  # of an image of the last comparison

    def run(
        self,
        name: str,
        compare: Callable[[tuple[int, int]], list[CheckRow]],
        judge: Callable[[list[CheckRow]], None],
    ) -> Checked:
        """Compare at each size, until the rest of the time does not suffice for the next.

        Args:
            name: Name of the model.
            compare: Compares at a size, with each batch in `comparing`.
            judge: Called after each size with all rows so far; raises `ExportError` if some have failed.

        Returns:
            The rows in the order of the given sizes.

        Raises:
            ExportError: The comparison fails, or the time does not suffice for any size.
        """
        rows: list[CheckRow] = []
        for number, size in enumerate(self._order):
            try:
                rows += compare(size)
            except TimeLimitError:
                if not number:
                    raise ExportError(self._nothing(name)) from None
                break
            judge(rows)
        else:
            number = len(self._order)
        left = self._order[number:]
        if left:
            seconds = sum(self._estimate(size, self.batches) for size in left)
            self.budget.tell(
                f"The time limit does not suffice for the other sizes, which take {seconds:,.0f} s by estimate."
            )
        rows.sort(key=lambda row: self.sizes.index((row.height, row.width)))
        return Checked(rows, [size_text(*size) for size in self.sizes if size in left])

    def _estimate(self, size: tuple[int, int], batches: Sequence[int]) -> float:
        """Seconds for the comparisons at a size."""
        return sum(batches) * self._seconds * min(math.prod(size) / self._pixels, MOST_GROWTH)

    @contextmanager
    def comparing(self, size: tuple[int, int], number: int, note: str = "") -> Iterator[None]:
        """Tell of one comparison, and measure its time.

        Args:
            size: Height and width.
            number: Place of the batch size in `batches`.
            note: What else to tell of it.

        Raises:
            TimeLimitError: This and the following batches of the size would take longer than the rest of the time.
        """
        if not self.budget.allows(self._estimate(size, self.batches[number:])):
            raise TimeLimitError
        place = self._order.index(size) * len(self.batches) + number + 1
        what = f"Comparison {place} of {len(self._order) * len(self.batches)}, {size_text(*size)}"
        self.budget.tell_time(f"{what}, batch {self.batches[number]}{note}", not number and not note)
        start = self.budget.spent
        yield
        self._seconds, self._pixels = (self.budget.spent - start) / self.batches[number], math.prod(size)

    def _nothing(self, name: str) -> str:
        return (
            f"The check of {name} cannot compare a single size, {size_text(*self._order[0])}, within the time limit of "
            f"{self.budget.limit:,.10g} s of CPU time for all steps: {self.budget.spent:,.0f} s have passed. Raise the "
            "limit with --time-limit (time_limit=); a file outside a bundle can also do without a check, with "
            "--no-check (check=False)."
        )
