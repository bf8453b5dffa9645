"""`visionattn demo`: serve the page that runs models in the browser."""

from __future__ import annotations

import argparse

from rich.console import Console

from visionattn.arguments import whole_number
from visionattn.demo.server import LARGEST_PORT, demo

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--port",
        type=whole_number(0, LARGEST_PORT),
        default=8000,
        metavar="N",
        help="port on this machine, 0 for any free one (default: 8000)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Returns:
        0; Ctrl-C raises, as in every command.

    Raises:
        InputError: The page is not built, or the port cannot be used.
    """
    demo(args.port, Console(highlight=False, markup=False, soft_wrap=True).print)
    return 0
