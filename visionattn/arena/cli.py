"""`visionattn arena [MIXER ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from visionattn.arena.api import TASKS, arena
from visionattn.arguments import call_with, whole_number
from visionattn.progress import new_console

__all__ = ["add_arguments", "run"]


def _list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of a comma-separated list."""
    return lambda text: [parse(part.strip()) for part in text.split(",") if part.strip()]


def _task(text: str) -> str:
    if text not in TASKS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(repr, TASKS))}; got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("mixers", nargs="*", metavar="MIXER", help="names of mixers (default: all)")
    parser.add_argument(
        "--tasks",
        type=_list(_task),
        default=list(TASKS),
        help=f"comma-separated list of {','.join(TASKS)} (default: all)",
    )
    parser.add_argument(
        "--grid", type=_list(whole_number(2, 512)), help="sides of the grids on which costs are measured, as 14,28,56"
    )
    parser.add_argument("--seeds", type=whole_number(1), help="number of training seeds (default: 3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="train and measure for about a quarter of the time")
    parser.add_argument(
        "--data", metavar="FOLDER", help="images train/CLASS/* and test/CLASS/* (default: the embedded digits)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="runs/arena", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        metavar="N",
        help="number of networks to train in parallel (default: one per CPU core)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    args.console = new_console()
    found = call_with(arena, args)
    args.console.print(found.table())
    args.console.print(f"Report: {found.folder / 'report.html'}")
    return 0
