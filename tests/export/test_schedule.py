"""Comparisons from the cheapest to the costliest size, within a time limit."""

from __future__ import annotations

import pytest

from tests.export.clock import Clock
from visionattn.errors import ExportError
from visionattn.export.budget import Budget
from visionattn.export.rows import CheckRow
from visionattn.export.schedule import Schedule

SIZES = [(30, 30), (10, 10), (5, 40)]


class Timed:
    """A check whose comparisons take `speed` seconds per pixel."""

    def __init__(self, limit: float, speed: float = 1.0, wrong: tuple[int, int] | None = None) -> None:
        self.clock, self.lines, self.compared = Clock(), [], []
        self.schedule = Schedule(SIZES, (1, 2), Budget(limit, self.lines.append, self.clock))
        self.speed, self.wrong = speed, wrong

    def compare(self, size: tuple[int, int]) -> list[CheckRow]:
        rows = []
        for number, batch in enumerate((1, 2)):
            with self.schedule.comparing(size, number):
                self.clock.seconds += self.speed * batch * size[0] * size[1]
                self.compared.append((size, batch))
                rows.append(CheckRow("map", batch, *size, (float(size == self.wrong),), 1.0, 0.5))
        return rows

    def judge(self, rows: list[CheckRow]) -> None:
        if not all(row.passed for row in rows):
            raise ExportError(f"wrong in {len(rows)}")

    def run(self):
        return self.schedule.run("Net", self.compare, self.judge)


def test_order_is_that_of_the_cost_and_rows_are_in_the_order_given():
    timed = Timed(float("inf"))
    rows, unchecked = timed.run()
    assert timed.compared == [(size, batch) for size in ((10, 10), (5, 40), (30, 30)) for batch in (1, 2)]
    assert [(row.height, row.width) for row in rows] == [size for size in SIZES for _ in range(2)]
    assert unchecked == []


@pytest.mark.parametrize(
    ("limit", "unchecked"),
    [(3600, []), (3599, ["30 x 30"]), (900, ["30 x 30"]), (899, ["30 x 30", "5 x 40"]), (300, ["30 x 30", "5 x 40"])],
)
def test_no_size_is_begun_that_would_not_end(limit, unchecked):
    """The sizes take 300, 600 and 2700 s."""
    timed = Timed(limit)
    rows, left = timed.run()
    assert left == unchecked
    assert len(rows) == 2 * (3 - len(left))
    assert timed.clock.seconds == {0: 3600, 1: 900, 2: 300}[len(left)]
    assert ("does not suffice" in timed.lines[-1]) == bool(left)


def test_time_of_what_is_left_is_estimated():
    timed = Timed(300)
    timed.run()
    assert timed.lines[-1] == ("The time limit does not suffice for the other sizes, which take 3,300 s by estimate.")


def test_image_of_one_pixel_is_no_measure_of_the_work():
    """In proportion to the pixels, the second size would take as many hours as the first takes seconds."""
    clock = Clock()
    schedule = Schedule([(60, 60), (1, 1)], [1], Budget(30, clock=clock))

    def compare(size):
        with schedule.comparing(size, 0):
            clock.seconds += 1
        return [CheckRow("map", 1, *size, (0.0,), 1.0, 0.5)]

    rows, unchecked = schedule.run("Net", compare, lambda rows: None)
    assert (len(rows), unchecked) == (2, [])


def test_nothing_is_compared_when_the_steps_before_took_the_time():
    timed = Timed(50)
    timed.clock.seconds = 51
    with pytest.raises(ExportError, match=r"Net cannot compare a single size, 10 x 10, .* 50 s .*: 51 s have passed"):
        timed.run()
    assert timed.compared == []


def test_sizes_given_twice_or_as_lists_are_compared_once():
    timed = Timed(float("inf"))
    timed.schedule = Schedule([[10, 10], (5, 40), (10, 10)], (1, 2), timed.schedule.budget)
    rows, unchecked = timed.run()
    assert [(row.height, row.width) for row in rows] == [(10, 10), (10, 10), (5, 40), (5, 40)]
    assert unchecked == []


def test_wrong_size_ends_the_check():
    timed = Timed(float("inf"), wrong=(5, 40))
    with pytest.raises(ExportError, match="wrong in 4"):
        timed.run()
    assert timed.compared[-1] == ((5, 40), 2)


def test_lines_say_which_of_how_many():
    timed = Timed(float("inf"), speed=0.01)
    timed.run()
    assert timed.lines == [
        "Comparison 1 of 6, 10 x 10, batch 1: 0 s of CPU time so far.",
        "Comparison 3 of 6, 5 x 40, batch 1: 3 s of CPU time so far.",
        "Comparison 5 of 6, 30 x 30, batch 1: 9 s of CPU time so far.",
    ]
