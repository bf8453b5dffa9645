"""Progress of long work: bars in a terminal, a line from time to time in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

from visionattn.progress import draws_bars

__all__ = ["EVERY", "LoggedProgress", "show_progress"]

EVERY = 30.0
"""Seconds between two lines of a log."""


class LoggedProgress(Progress):
    """Writes a line with an estimate every 30 seconds instead of bars.

    Args:
        console: Console for the lines.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._last = time.monotonic()
        self._starts: dict[TaskID, tuple[float, float]] = {}  # time, and the amount completed then

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        """Start a task."""
        number = super().add_task(description, *args, **options)
        self._starts[number] = time.monotonic(), self._tasks[number].completed
        return number

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count completed work, and write a line if it is time."""
        super().advance(task_id, advance)
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last = now
            self.console.print("; ".join(self._words(task, now) for task in self.tasks if not task.finished) or "done")

    def _words(self, task: Task, now: float) -> str:
        start, before = self._starts[task.id]
        words = f"{task.description}: {task.completed:,.0f}"
        if not task.total:
            return words
        words += f" of {task.total:,.0f} ({task.completed / task.total:.0%})"
        if task.completed <= before:
            return words
        left = (now - start) * (task.total - task.completed) / (task.completed - before)
        return f"{words}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Bars that disappear when they are done; lines of text if the output is not a terminal or notebook."""
    if not draws_bars(console):
        yield LoggedProgress(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress
