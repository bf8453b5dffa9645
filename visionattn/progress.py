"""Consoles, and progress of long tasks: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["counted", "draws_bars", "new_console", "session_console"]

EVERY = 30.0  # seconds between lines of a log


def new_console() -> Console:
    """A console with the width of the terminal; in a pipe rows must not be cut."""
    return Console(width=None if sys.stdout.isatty() else 160)


def session_console() -> Console | None:
    """The console for long-running functions: in a notebook or an interactive session; None in a program."""
    return Console(stderr=True) if hasattr(sys, "ps1") else None


def draws_bars(console: Console) -> bool:
    """Whether a console shows progress bars: a terminal does, and a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


@contextmanager
def counted(what: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show progress.

    Args:
        what: What is counted, such as `"images"`.
        total: Total count.
        console: A terminal or notebook shows a bar, which is removed at the end. Elsewhere a line is printed to stderr
            every 30 seconds. None shows nothing.

    Yields:
        A function to call with the number of newly completed items.
    """
    if console is not None and draws_bars(console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)
        return
    done, said = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if console is not None and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            print(f"{done:,} of {total:,} {what}", file=sys.stderr, flush=True)

    yield advance
