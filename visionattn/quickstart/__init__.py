"""A tour of the package on real data from installed packages: one station per file, without downloads.

A new station is a new module in this folder: the first line of its docstring is its title, and `visit(folder, console)`
does the work and writes into `folder`, with a README.md that describes the files. Stations are discovered by file.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shutil
import time
from pathlib import Path

from rich.console import Console

from visionattn.errors import InputError, StorageError, UnknownNameError, require, shorten
from visionattn.progress import new_console

__all__ = ["add_arguments", "run", "run_command", "stations"]

TITLE = "# What `visionattn quickstart` left here\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn quickstart`."""
    parser.add_argument("stations", nargs="*", help="stations to visit (default: all)")
    parser.add_argument("--output", type=Path, default=Path("visionattn-quickstart"), help="folder for the results")


def run_command(args: argparse.Namespace) -> int:
    """Run `visionattn quickstart`."""
    run(args.output, args.stations, new_console())
    return 0


def stations() -> list[str]:
    """Names of the stations, in the order of the tour."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _empty(folder: Path) -> None:
    """Create a station's folder, or empty it if an earlier tour wrote it; any other folder is an error."""
    readme = folder / "README.md"
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (readme.is_file() and readme.read_bytes().startswith(TITLE.encode())):
                raise InputError(
                    f"The folder {shorten(folder)} contains other files. Give another folder with --output, or move "
                    "it away."
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        readme.write_text(TITLE + "\nThe tour has not been finished.\n")
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"Cannot write to the folder {shorten(folder)}: {reason}. Give another folder with --output."
        ) from error


def run(folder: Path, chosen: list[str], console: Console) -> None:
    """Visit stations, each with a subfolder for its results.

    Args:
        folder: Folder of the tour.
        chosen: Stations to visit; empty for all.
        console: Console for progress and tables.

    Raises:
        UnknownNameError: A station does not exist.
        MissingPackageError: The packages for training or export are not installed.
        InputError: A station's folder contains files that no earlier tour wrote.
        StorageError: A station's folder cannot be created or written to.
    """
    for name in chosen:
        if name not in stations():
            raise UnknownNameError(
                f"The station must be one of {', '.join(map(repr, stations()))}; got {shorten(name)!r}."
            )
    require("lightning", "all")
    require("onnxruntime", "all")
    require("faiss", "all")
    for name in chosen or stations():  # before the first one's minutes of work
        _empty(folder / name)
    for name in chosen or stations():
        module = importlib.import_module(f"{__name__}.{name}")
        console.rule((module.__doc__ or name).split("\n")[0])
        start = time.perf_counter()
        module.visit(folder / name, console)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s. See {folder / name / 'README.md'}\n")
