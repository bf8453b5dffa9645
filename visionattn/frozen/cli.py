"""`visionattn inspect BACKBONE --images FOLDER`: layer-by-layer report on the attention of a frozen backbone."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from visionattn.arguments import call_with, number, whole_number
from visionattn.errors import shorten
from visionattn.frozen.inspect import inspect
from visionattn.frozen.inspection import Inspection
from visionattn.frozen.report import PLAN, summary

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("backbone", metavar="NAME|CKPT", help="name in timm's registry, or a weight file or folder")
    parser.add_argument(
        "--images", required=True, metavar="FOLDER", help="folder of images; its sub-folders, if any, are the classes"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME")
    parser.add_argument("--random", action="store_true", help="untrained weights for NAME")
    parser.add_argument(
        "--image-size", type=whole_number(1, 2048), metavar="PIXELS", help="side of the images (default: the model's)"
    )
    parser.add_argument(
        "--count", type=whole_number(2), default=64, metavar="N", help="number of images to read (default: %(default)s)"
    )
    parser.add_argument(
        "--masks",
        type=whole_number(2),
        default=200,
        metavar="N",
        help="random occlusion masks per image (default: %(default)s)",
    )
    parser.add_argument(
        "--policy", nargs="+", metavar="NAME", help="measure sparse attention: 'all', or names of policies"
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        type=number(0, 1, above=True),
        default=[0.125],
        metavar="SHARE",
        help="share of all keys that a query reads under a policy (default: 0.125)",
    )
    parser.add_argument("--tokens", action="store_true", help="measure the model with fewer tokens")
    parser.add_argument("--heads", action="store_true", help="measure the model with fewer heads")
    parser.add_argument(
        "--maps",
        type=whole_number(0),
        default=8,
        metavar="N",
        help="number of images on the contact sheet (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of the report (default: runs/inspect/BACKBONE)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report in that folder")
    parser.set_defaults(progress=True)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if some images could not be read; these are listed.

    Raises:
        VisionAttnError: No report could be written.
    """
    if args.output is None:
        name = Path(args.backbone).stem if Path(args.backbone).exists() else args.backbone
        args.output = Path("runs/inspect") / re.sub(r"[^\w.-]+", "-", name)[:100]
    if args.policy == ["all"]:
        args.policy = "all"
    found = call_with(inspect, args)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(_table(found))
    console.print(summary(found))
    if found.look.reached.not_called:
        console.print(f"note: not reached: {shorten(', '.join(found.look.reached.not_called))}")
    assert found.folder is not None
    if found.plan is not None:
        console.print(f"The plan is {found.folder / PLAN}: {found.plan.policy}.")
    console.print(f"The report is {found.folder / 'report.html'}; its tables are in the same folder.")
    for image, reason in found.skipped:
        print(f"visionattn: left out: {shorten(image)}: {reason}", file=sys.stderr)
    return int(bool(found.skipped))


def _table(found: Inspection) -> Table:
    table = Table(
        "layer", "effective keys", "received", "class share", "outliers", "largest channel", "tiles", box=None
    )
    for one in found.look.layers:
        table.add_row(
            one.layer,
            f"{one.effective_keys:.1f} of {one.keys}",
            f"{one.received:.1f}",
            "" if one.class_share != one.class_share else f"{one.class_share:.1%}",
            f"{one.outliers:.1f}",
            "" if one.channel_share != one.channel_share else f"{one.channel_share:.0%}",
            f"{one.tiles:.0%}",
        )
    return table
