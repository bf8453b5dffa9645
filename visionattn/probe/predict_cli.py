"""`visionattn predict IMAGES ... --head FILE`: apply a head saved by `visionattn probe` to images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from visionattn.arguments import whole_number
from visionattn.errors import InputError, shorten
from visionattn.files import check_output
from visionattn.probe.applying import Applied, apply_head, write_applied

__all__ = ["add_arguments", "run"]

SHOWN, COLUMNS = 20, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="images, including sub-folders")
    parser.add_argument("--head", required=True, metavar="FILE", help="head that `visionattn probe` saved")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--top",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="number of most likely classes per image (default: %(default)s)",
    )
    form.add_argument("--probabilities", action="store_true", help="write the probability of every class")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help="CSV or JSON (default: predictions.csv)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--backbone", metavar="NAME|CKPT", help="backbone, if it has moved since the head was saved")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if some images could not be read; these are listed.

    Raises:
        VisionAttnError: No image could be classified.
    """
    check_output(args.output, args.overwrite, (".csv", ".json"))
    applied = apply_head(args.images, args.head, backbone=args.backbone, checkpoint=args.checkpoint, device=args.device)
    if applied.task != "classification" and args.top > 1:
        raise InputError(f"--top is for one class per image; {shorten(args.head)} is a head for {applied.task}.")
    if args.top > len(applied.classes):
        count = len(applied.classes)
        raise InputError(f"--top must be from 1 to {count}, the number of classes; got {args.top}.")
    write_applied(applied, args.output, args.top, args.probabilities)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(_table(applied, args.top))
    if len(applied.images) > SHOWN:
        console.print(f"{len(applied.images) - SHOWN:,} more images.")
    console.print(f"The predictions are in {args.output}.")
    for name, reason in applied.skipped:
        print(f"visionattn: left out: {shorten(name)}: {reason}", file=sys.stderr)
    return int(bool(applied.skipped))


def _table(applied: Applied, top: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("image")
    if applied.task != "classification":
        for name in applied.classes[:COLUMNS]:
            table.add_column(shorten(name, 30), justify="right")
        for image, values in zip(applied.images[:SHOWN], applied.probabilities[:, :COLUMNS].tolist()):
            table.add_row(shorten(image, 60), *(f"{value:.3g}" for value in values))
        return table
    for place in range(top):
        table.add_column("class" if place == 0 else f"class {place + 1}")
        table.add_column("%", justify="right")
    for name, entries in zip(applied.images[:SHOWN], applied.top(top)):
        cells = [cell for label, probability in entries for cell in (label, f"{100 * probability:.1f}")]
        table.add_row(shorten(name, 60), *cells)
    return table
