"""A tour through the package on real data that its wheels bring: one station a file, nothing is downloaded.

A new station is a new module here: its docstring's first line is its title, `visit(folder, console)` does the work and
writes into `folder`, where a README.md says what is what. Stations are found by being here.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from pathlib import Path

from rich.console import Console

from visionattn.errors import UnknownNameError, require

__all__ = ["run", "stations"]


def stations() -> list[str]:
    """Names of the stations, in the order of the tour."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def run(folder: Path, chosen: list[str], console: Console) -> None:
    """Visit stations, each with a sub-folder for what it writes.

    Args:
        folder: Folder of the tour.
        chosen: Stations to visit; empty for all.
        console: Where progress and tables appear.

    Raises:
        UnknownNameError: There is no such station.
        MissingPackageError: Training or export is not installed.
    """
    require("lightning", "all")
    require("onnxruntime", "all")
    for name in chosen:
        if name not in stations():
            raise UnknownNameError(f"There is no station {name!r}; there are {', '.join(stations())}.")
    for name in chosen or stations():
        module = importlib.import_module(f"{__name__}.{name}")
        console.rule((module.__doc__ or name).split("\n")[0])
        start = time.perf_counter()
        module.visit(folder / name, console)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s. What is what: {folder / name / 'README.md'}\n")
