"""The console script `visionattn`: prints its version and the list of models itself, and delegates to `visionattn.cli`.

`visionattn list` reads the package's table `costs.csv` without importing the package, and thus without PyTorch. The
other commands import hundreds of thousands of objects, so that the garbage collector rests during the import, and the
process ends without freeing them one by one: together 1.5 to 2 s of CPU time per command.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import fnmatch
import gc
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["facts", "main", "model_table", "paused_collection"]


def main() -> int:
    """Run the command of `sys.argv`.

    Returns:
        The exit code (see `visionattn.cli.main`).
    """
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"visionattn {version('visionattn')}")
        return 0
    if arguments[:1] == ["list"] and len(arguments) < 3 and not any(word.startswith("-") for word in arguments):
        rows = _rows(*arguments[1:])
        if rows:
            return _show(rows)
    codes: list[int] = []
    # Called last at exit: functions are called in reverse order, and the imports register theirs after this one.
    atexit.register(_leave, os.getpid(), codes)
    with paused_collection():
        from visionattn.cli import main as run
    codes.append(run())
    return codes[0]


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Suspend the garbage collector during imports, which make no garbage and many objects to look at."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _leave(process: int, codes: list[int]) -> None:
    """End the process at once, after everything else that runs at exit; after an exception, leave it to Python."""
    if not codes or os.getpid() != process or hasattr(sys, "last_type"):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, a broken or a closed one
            stream.flush()
    os._exit(codes[0])


def facts(row: Mapping[str, Any]) -> list[str]:
    """Cells of the table after a model's name, from a row of costs.csv."""
    parameters, macs = int(row["parameters"]) / 1e6, int(row["macs"]) / 1e6
    return [row["task"], f"{parameters:.2f} M", f"{macs:,.1f} M", row["input"], row["weights"]]


def model_table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Build the table of models for a rich console from rows of costs.csv."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("name", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "parameters", "MACs", "input", "weights"):
        table.add_column(column, justify="right" if column in ("parameters", "MACs") else "left", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *facts(row))
    return table


def _rows(pattern: str = "*") -> list[dict[str, str]]:
    """Rows of costs.csv whose names match; none if the file cannot be read."""
    spec = find_spec("visionattn")  # finds the package and does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            with (Path(folder) / "costs.csv").open(newline="", encoding="utf-8") as file:
                return [row for row in csv.DictReader(file) if fnmatch.fnmatch(row["name"], f"*{pattern}*")]
        except OSError:
            continue
    return []


def _show(rows: list[dict[str, str]]) -> int:
    from rich.console import Console

    try:
        Console(width=None if sys.stdout.isatty() else 160).print(model_table(rows))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
