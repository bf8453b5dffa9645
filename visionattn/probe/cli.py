"""`visionattn probe BACKBONE ... --data FOLDER|DATASET`: evaluate frozen backbones from one pass over the images.

`visionattn probe --compare REPORT ...` compares the reports of earlier runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from visionattn.arguments import add_old_spelling, number, whole_number
from visionattn.errors import InputError, shorten
from visionattn.probe.api import run_probe, run_probes
from visionattn.probe.comparing import compare_reports
from visionattn.probe.comparison import Comparison
from visionattn.probe.embedding import embed
from visionattn.probe.report.table import best_heads, compared_backbones
from visionattn.probe.report.tasks import TaskReport
from visionattn.probe.settings import DTYPES, HEADS, LARGEST, LRS, SEEDS, TASKS, ProbeSettings

__all__ = ["add_arguments", "run"]


def _numbers(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of a comma-separated list."""

    def parse_all(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",") if part.strip()]

    return parse_all


def _size(text: str) -> float:
    return number(0, 1, above=True)(text) if "." in text else whole_number(1)(text)


def _pixels(text: str) -> int | tuple[int, int]:
    side = whole_number(1, LARGEST)
    height, cross, width = text.partition("x")
    return (side(height), side(width)) if cross else side(text)


def _layers(text: str) -> str | list[int]:
    return text if text in ("last", "all") else _numbers(whole_number(-(10**4), 10**4))(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "backbone",
        nargs="*",
        metavar="NAME|CKPT",
        help="name in timm's registry, or a weight file or folder; several (also NAME=FILE) are compared",
    )
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="REPORT", help="compare folders of reports; nothing is probed"
    )
    parser.add_argument(
        "--embed", type=Path, metavar="FILE.npz", help="write one vector per image of --data; nothing is probed"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME; with or without a classifier")
    parser.add_argument("--random", action="store_true", help="untrained weights for NAME")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FOLDER|DATASET", help="images by class, or digits, mnist, torch/..., hfds/...")
    data.add_argument("--task", choices=TASKS, help="task of the heads (default: %(default)s)")
    data.add_argument("--classes", type=Path, metavar="FILE", help="class names for segmentation, one per line")
    data.add_argument("--root", metavar="FOLDER", help="folder of the files of a named dataset")
    data.add_argument("--train-split", metavar="NAME", help="training split, of readers with named splits")
    data.add_argument(
        "--val-split",
        metavar="NAME",
        help="validation split; also used for testing if there is no test split",
    )
    data.add_argument("--test-split", metavar="NAME", help="test split")
    data.add_argument(
        "--num-classes", type=whole_number(2), metavar="N", help="number of classes, if the data does not define it"
    )
    data.add_argument(
        "--image-size",
        type=_pixels,
        metavar="PIXELS",
        help="side of the images, or HEIGHTxWIDTH for segmentation (default: the model's)",
    )
    data.add_argument(
        "--workers", type=whole_number(0, 1024), metavar="N", help="loading processes (default: %(default)s)"
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--layers", type=_layers, help="last, all, or indices such as 3,7,11")
    tokens.add_argument("--dtype", choices=tuple(DTYPES), help="type of stored tokens (default: %(default)s)")
    tokens.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="folder of stored tokens (default: features in the output)"
    )
    tokens.add_argument("--live", action="store_true", help="store no tokens; run the backbone in each pass")
    heads = parser.add_argument_group("heads")
    heads.add_argument(
        "--heads", type=_numbers(str), metavar="LIST", help=f"poolings (default: {','.join(HEADS)}; linear,attentive)"
    )
    heads.add_argument("--optimizer", choices=tuple(LRS), help="adamw, or the paper's lars")
    heads.add_argument(
        "--lrs", type=_numbers(number(0, above=True)), metavar="LIST", help="learning rates (lars: x batch size / 256)"
    )
    heads.add_argument("--weight-decays", type=_numbers(number(0)), metavar="LIST", help="default: 0")
    heads.add_argument(
        "--seeds", type=_numbers(whole_number(0, SEEDS)), metavar="LIST", help="seeds of initial weights"
    )
    heads.add_argument("--epochs", type=whole_number(1), metavar="N", help="epochs (default: %(default)s; paper: 90)")
    heads.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="images per step (default: 256, for other tasks 16 or 32; paper: 4096)",
    )
    heads.add_argument("--no-knn", action="store_true", help="skip nearest neighbours")
    heads.add_argument("--no-pixels", action="store_true", help="skip the baseline of 16 x 16 pixels")
    heads.add_argument(
        "--few-shot", type=_numbers(_size), metavar="LIST",
        help="images per class, or fractions such as 0.01 (default: 1,5,10; '' for none)",
    )  # fmt: skip
    heads.add_argument(
        "--draws", type=whole_number(1), metavar="N", help="random few-shot subsets per size (default: %(default)s)"
    )
    heads.add_argument("--device", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")
    heads.add_argument("--devices", type=whole_number(1), metavar="N", help="number of devices, one process each")
    output = parser.add_argument_group("results")
    output.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/probe/BACKBONE-DATASET-HASH")
    output.add_argument("--overwrite", action="store_true", help="replace the report of another run in that folder")
    output.add_argument(
        "--maps",
        type=whole_number(0),
        metavar="N",
        help="test images with attention maps, or predicted masks (default: %(default)s)",
    )
    output.add_argument("--export", metavar="POOLING", help="write the backbone and this pooling's best head as ONNX")
    add_old_spelling(parser, "--dataset", "--data")
    add_old_spelling(parser, "--precision", "--dtype", {old: new for new, old in DTYPES.items() if old != new})
    parser.set_defaults(**vars(ProbeSettings()))


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if some images could not be read; these are listed.

    Raises:
        VisionAttnError: No report could be written.
    """
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    if args.compare:
        if args.backbone or args.data is not None:
            raise InputError("--compare accepts only reports: remove NAME|CKPT and --data.")
        found = compare_reports(args.compare, {}, args.output, args.overwrite, args.device, always_write=True)
        _print_comparison(console, found)
        return 0
    missing = ["NAME|CKPT"] * (not args.backbone) + ["--data"] * (args.data is None)
    if missing:
        raise InputError(f"The following arguments are required: {', '.join(missing)}. See visionattn probe --help.")
    settings = ProbeSettings(**{entry.name: getattr(args, entry.name) for entry in fields(ProbeSettings)})
    if args.embed is not None:
        return _embed(args, settings)
    if len(args.backbone) > 1:
        found = run_probes(args.backbone, args.data, settings, always_write=True)
        _print_comparison(console, found)
        return int(any(one.report["skipped"] for one in found.judged))
    report = run_probe(args.backbone[0], args.data, settings, always_write=True)
    console.print(report.table() if isinstance(report, TaskReport) else best_heads(report))
    console.print(report.summary())
    for note in report.notes:
        console.print(f"note: {note}")
    assert report.folder is not None
    heads = "" if isinstance(report, TaskReport) else " and heads"
    console.print(f"The report is {report.folder / 'report.html'}; its tables are in the same folder{heads}.")
    for entry in report.skipped:
        print(f"visionattn: left out of {entry.part}: {entry.name}: {entry.reason}", file=sys.stderr)
    return int(bool(report.skipped))


def _embed(args: argparse.Namespace, settings: ProbeSettings) -> int:
    if len(args.backbone) > 1:
        raise InputError(f"--embed requires a single backbone; got {len(args.backbone)}.")
    found = embed(args.backbone[0], args.data, args.embed, settings=settings)
    count, width = found.features.shape
    classes = f", of {len(found.classes):,} classes" if found.classes else ", without labels"
    print(f"Wrote {args.embed}: {count:,} vectors of {width:,} values, {found.facts['features']}{classes}.")
    for name, reason in found.skipped:
        print(f"visionattn: left out: {shorten(name)}: {reason}", file=sys.stderr)
    return int(bool(found.skipped))


def _print_comparison(console: Console, comparison: Comparison) -> None:
    console.print(compared_backbones(comparison))
    console.print(comparison.summary())
    for note in comparison.notes:
        console.print(f"note: {note}")
    assert comparison.folder is not None
    console.print(f"The comparison is {comparison.folder / 'comparison.html'}; its tables are in the same folder.")
