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
from visionattn.predict.arguments import add_output_arguments
from visionattn.probe.applying import Applied, HeadClassifier, open_classifier
from visionattn.probe.prediction_files import write_applied, write_masks

__all__ = ["add_arguments", "run"]

SHOWN, COLUMNS = 20, 6
TABLE, MASKS = Path("predictions.csv"), Path("masks")  # default outputs
# Options of some tasks only.
_ONLY = {
    "top": ("classification",),
    "probabilities": ("classification", "multilabel", "regression"),
    "color": ("segmentation",),
    "skip_existing": ("segmentation",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="images, including sub-folders")
    parser.add_argument("--head", required=True, metavar="FILE", help="head that `visionattn probe` saved")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--top", type=whole_number(1), metavar="N", help="number of most likely classes per image (default: 1)"
    )
    form.add_argument("--probabilities", action="store_true", help="write the probability of every class")
    parser.add_argument("--color", "--colour", action="store_true", help="also write NAME_color.png: masks over images")
    parser.add_argument(
        "--output",
        metavar="FILE|FOLDER",
        help=f"CSV or JSON (default: {TABLE}); for segmentation, the folder of the masks (default: {MASKS})",
    )
    add_output_arguments(parser)
    parser.add_argument("--backbone", metavar="NAME|CKPT", help="backbone, if it has moved since the head was saved")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if some images could not be read; these are listed.

    Raises:
        VisionAttnError: The head cannot be used, an option does not fit it, or there are no images.
    """
    classifier = open_classifier(args.head, backbone=args.backbone, checkpoint=args.checkpoint, device=args.device)
    for option, tasks in _ONLY.items():
        if getattr(args, option) and classifier.task not in tasks:
            name = f"--{option.replace('_', '-')}"
            raise InputError(
                f"{name} is for heads of {' or '.join(tasks)}; {shorten(args.head)} is a head of {classifier.task}."
            )
    if classifier.task == "segmentation":
        output = MASKS if args.output is None else args.output
        return write_masks(
            classifier,
            args.images,
            output,
            color=args.color,
            overwrite=args.overwrite,
            skip_existing=args.skip_existing,
        ).exit_code
    return _write_table(args, classifier)


def _write_table(args: argparse.Namespace, classifier: HeadClassifier) -> int:
    """Write and print the predictions of heads that have some numbers per image."""
    output = check_output(TABLE if args.output is None else args.output, args.overwrite, (".csv", ".json"))
    top = args.top or 1
    if top > len(classifier.classes):
        count = len(classifier.classes)
        raise InputError(f"--top must be from 1 to {count}, the number of classes; got {top}.")
    applied = classifier.apply(args.images)
    write_applied(applied, output, top, args.probabilities)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(_table(applied, top))
    if len(applied.images) > SHOWN:
        console.print(f"{len(applied.images) - SHOWN:,} more images.")
    console.print(f"The predictions are in {output}.")
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
