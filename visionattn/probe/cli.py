"""`visionattn probe BACKBONE --dataset NAME --root FOLDER`: a frozen backbone, judged from one pass over the images."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.data import resolve_model_data_config

import visionattn
from visionattn.arguments import number, whole_number
from visionattn.errors import InputError, VisionAttnError, require, shorten
from visionattn.files import check_folder
from visionattn.probe.heads.banks import Head, HeadSpec, create_head, grid
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.inputs import make_backbone, read_images, read_model
from visionattn.probe.output import check_report, default_output
from visionattn.probe.processes import one_writer, rank_and_size
from visionattn.probe.report.rendering import write_report
from visionattn.probe.report.report import LayerNeighbours, Report, percent
from visionattn.probe.sweep import hold_out
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.shards import PRECISIONS
from visionattn.probe.work import HOLDOUT, WARMUP, ProbingRun

__all__ = ["add_arguments", "run"]

LARGEST = 2048  # pixels of an image's side
HEADS = ("cls", "gap", "ep_8", "ep_16", "ep_32")
# Of AdamW, whose steps have one size whatever the scale is; of LARS, the paper's range.
LRS = {"adamw": (0.001, 0.003, 0.01, 0.03, 0.1), "lars": (0.1, 0.3, 1.0)}


def _numbers(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a comma list."""

    def parse_all(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",") if part.strip()]

    return parse_all


def _size(text: str) -> float:
    return number(0, 1, above=True)(text) if "." in text else whole_number(1)(text)


def _layers(text: str) -> str | list[int]:
    return text if text in ("last", "all") else _numbers(whole_number(-(10**4), 10**4))(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("backbone", metavar="NAME|CKPT", help="name in timm's registry, or a weight file or folder")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME; a classifier in it is not needed")
    parser.add_argument("--random", action="store_true", help="untrained weights for NAME")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="digits, mnist, folder, torch/..., hfds/...")
    data.add_argument("--root", metavar="FOLDER", help="where the files are")
    data.add_argument(
        "--train-split", default="train", metavar="NAME", help="training split, of readers with named splits"
    )
    data.add_argument(
        "--val-split",
        default="validation",
        metavar="NAME",
        help="validation split; also used for testing if there is no test split",
    )
    data.add_argument("--test-split", metavar="NAME", help="test split")
    data.add_argument("--num-classes", type=whole_number(2), metavar="N", help="where the data do not say it")
    data.add_argument(
        "--image-size",
        type=whole_number(1, LARGEST),
        metavar="PIXELS",
        help="side of the images (default: the model's)",
    )
    data.add_argument(
        "--workers", type=whole_number(0, 1024), default=0, metavar="N", help="loading processes (default: 0)"
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--layers", type=_layers, default="last", help="last, all, or indices such as 3,7,11")
    tokens.add_argument("--precision", choices=tuple(PRECISIONS), default="fp16", help="on disk (default: fp16)")
    tokens.add_argument("--cache", type=Path, metavar="FOLDER", help="for tokens (default: features in the output)")
    tokens.add_argument("--live", action="store_true", help="store no tokens: run the backbone at each pass")
    heads = parser.add_argument_group("heads")
    heads.add_argument("--heads", type=_numbers(str), metavar="LIST", help=f"poolings (default: {','.join(HEADS)})")
    heads.add_argument("--optimizer", choices=tuple(LRS), default="adamw", help="adamw, or the paper's lars")
    heads.add_argument(
        "--lrs", type=_numbers(number(0, above=True)), metavar="LIST", help="learning rates; lars: times batch / 256"
    )
    heads.add_argument("--weight-decays", type=_numbers(number(0)), default=[0.0], metavar="LIST", help="default: 0")
    heads.add_argument(
        "--seeds", type=_numbers(whole_number(0, 2**63 - 1)), default=[0], metavar="LIST", help="of starting weights"
    )
    heads.add_argument("--epochs", type=whole_number(1), default=30, help="default: 30; the paper's: 90")
    heads.add_argument(
        "--batch-size", type=whole_number(1), default=256, help="images per step (default: 256; the paper's: 4096)"
    )
    heads.add_argument("--no-knn", action="store_true", help="leave out nearest neighbours")
    heads.add_argument("--no-pixels", action="store_true", help="leave out the baseline of 16 x 16 pixels")
    heads.add_argument(
        "--few-shot", type=_numbers(_size), default=[1, 5, 10], metavar="LIST",
        help="images a class, or fractions such as 0.01 (default: 1,5,10; '' for none)",
    )  # fmt: skip
    heads.add_argument(
        "--draws", type=whole_number(1), default=5, metavar="N", help="number of random few-shot subsets (default: 5)"
    )
    heads.add_argument("--device", help="such as cuda or cpu (default: a GPU where there is one)")
    heads.add_argument(
        "--devices", type=whole_number(1), default=1, metavar="N", help="how many of them, each in a process"
    )
    output = parser.add_argument_group("results")
    output.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/probe/BACKBONE-DATASET-HASH")
    output.add_argument("--overwrite", action="store_true", help="replace the report of another run in that folder")
    output.add_argument(
        "--maps", type=whole_number(0), default=4, metavar="N", help="test images with attention maps (default: 4)"
    )
    output.add_argument("--export", metavar="POOLING", help="write backbone and this pooling's best head as ONNX")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 where some images could not be read: they were left out and are listed.

    Raises:
        VisionAttnError: Nothing could be reported.
    """
    _complete(args)
    if args.devices == 1:
        return _probe(args)
    fabric = require("lightning.fabric", "train").Fabric(
        accelerator="cuda" if args.device.startswith("cuda") else "cpu", devices=args.devices, strategy="ddp_spawn"
    )
    result = fabric.launch(_probe_in_process, args)
    if isinstance(result, VisionAttnError):
        raise result
    return result


def _probe_in_process(fabric: Any, args: argparse.Namespace) -> int | VisionAttnError:
    """What each of several processes does; the first one's result is the command's."""
    args.device = str(fabric.device)
    try:
        return _probe(args)
    except VisionAttnError as error:  # raised there it would come back as a stack trace
        return error


def _probe(args: argparse.Namespace) -> int:
    """Probe, alone or as one of several processes, of which the first reports."""
    first = rank_and_size()[0] == 0
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=not first)
    model, weights, licence = read_model(args)
    images = read_images(args, resolve_model_data_config(model))
    backbone = make_backbone(args, model, images.size)
    notes: list[str] = []
    specs = _specs(args, backbone, len(images.classes), notes)
    work = ProbingRun(args, backbone, images, console)
    args.output = args.output or default_output(args, work.weights, images)
    args.cache = args.cache or args.output / "features"
    plan, command = work.plan(specs), _command_line(args)
    check_report(args.output, plan, command, work.weights, images, args.overwrite)
    for words in (*images.told, *images.left_out):
        console.print(words)
    with one_writer(args.output):
        return _report(args, work, specs, notes, plan, command, (weights, licence))


def _report(
    args: argparse.Namespace,
    work: ProbingRun,
    specs: list[HeadSpec],
    notes: list[str],
    plan: str,
    command: str,
    origin: tuple[str, str | None],
) -> int:
    """All parts of the work, then the report of them."""
    backbone, images, console = work.backbone, work.images, work.console
    start = time.perf_counter()
    train, test = work.features()
    extracting = time.perf_counter() - start
    found = work.sweep(train, test, specs)
    if "tokens" not in work.state.seconds:  # later runs only look whether they are there
        work.state.spend("tokens", extracting)
    held_out = len(hold_out(train.labels, torch.arange(len(train)), HOLDOUT, 0)[1])
    report = Report(
        command=command,
        backbone={
            "name": args.backbone,
            "weights": origin[0],
            "license": origin[1] or "not stated",
            "sha256": work.weights,
            "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        },
        data={
            "dataset": args.dataset,
            "root": args.root,
            "train_images": len(train),
            "test_images": len(test),
            "train_digest": images.train.digest,
            "test_digest": images.test.digest,
            "transform": images.transform,
        },
        protocol={
            "optimizer": args.optimizer,
            "epochs": args.epochs,
            "warm-up epochs": WARMUP * args.epochs,
            "batch": work.batch_size,
            "held-out share": HOLDOUT,
            "tokens in": "float32, not stored" if args.live else args.precision,
        },
        versions={"visionattn": visionattn.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy")},
        layers=backbone.layers,
        indices=backbone.indices,
        classes=images.classes,
        held_out=held_out,
        sweep=found,
        seconds={"tokens": work.state.seconds["tokens"], "heads": found.seconds},
        notes=[*notes, *images.left_out, *found.notes],
        skipped=work.skipped,
        plan=plan,
    )
    at_end = [result for result in report.best() if result.spec.lr in (min(args.lrs), max(args.lrs))]
    if at_end and len(args.lrs) > 1:
        names = ", ".join(f"{report.name(result)} ({result.spec.lr:g})" for result in at_end)
        report.notes.append(f"The chosen learning rate is an end of those tried for {names}: --lrs can take more.")
    if not args.no_knn:
        work.neighbours(report, train, test)
    if not args.no_pixels:
        work.pixels(report)
    if args.few_shot:
        work.few_shot(report, train, test)
    if rank_and_size()[0]:
        return 0
    work.maps(report, test)
    write_report(report, args.output)
    if args.export:
        work.export(report)
    _print(report, console)
    console.print(f"The report is {args.output / 'report.html'}; numbers and heads lie beside it.")
    for entry in work.skipped:
        print(f"visionattn: left out of {entry.part}: {entry.name}: {entry.reason}", file=sys.stderr)
    return int(bool(work.skipped))


def _complete(args: argparse.Namespace) -> None:
    """Check what needs no model, and fill in defaults that depend on other options."""
    if not args.dataset:
        raise InputError("--dataset must name a data set, such as folder or digits; got ''.")
    for folder in (args.output, args.cache):
        if folder is not None:
            check_folder(folder)
    args.lrs = args.lrs or list(LRS[args.optimizer])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = torch.cuda.device_count() if args.device.startswith("cuda") else max(8, os.cpu_count() or 1)
    if args.devices > max(1, there):
        raise InputError(f"--devices must be at most {max(1, there)} here; got {args.devices}.")
    if not (args.weight_decays and args.seeds):
        raise InputError("--weight-decays and --seeds must each give a number or more.")
    if args.export and args.heads and args.export not in args.heads:
        raise InputError(f"--export {shorten(args.export)} is none of the heads {shorten(', '.join(args.heads))}.")


def _command_line(args: argparse.Namespace) -> str:
    """Every option as it was used, so that other defaults of a later version change nothing."""
    words = ["visionattn", "probe", args.backbone]
    for key, value in vars(args).items():
        if key in ("command", "backbone", "overwrite") or value is None or value is False:
            continue
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            # Joined by "=", a value may begin with a minus.
            words[-1] += "=" + (",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(words)


def _specs(args: argparse.Namespace, backbone: Backbone, classes: int, notes: list[str]) -> list[HeadSpec]:
    """The heads to train: each pooling at each layer where it can be."""
    poolings = list(dict.fromkeys(args.heads or HEADS))
    specs = []
    for pooling in poolings:
        fitting, refused = [], None
        for position, layer in enumerate(backbone.layers):
            try:
                create_head(HeadSpec(pooling), layer, classes)
                fitting.append(position)
            except InputError as error:
                refused = error
        if refused is not None:
            if args.heads and not fitting:
                raise refused
            # Without a class token there is no such head to be expected.
            if pooling != "cls" or args.heads:
                names = [layer.name for place, layer in enumerate(backbone.layers) if place not in fitting]
                notes.append(f"{pooling} was left out at {', '.join(names)}: {refused}")
        specs += grid([pooling], fitting, [args.optimizer], args.lrs, args.weight_decays, args.seeds)
    if args.export and args.export not in {spec.pooling for spec in specs}:
        raise InputError(f"--export {args.export} is none of the heads {', '.join(poolings)} of this backbone.")
    return specs


def _count(head: Head) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def _print(report: Report, console: Console) -> None:
    """The best of each pooling."""
    reference = report.reference()
    p = {test.other: f"{test.p:.2g}" for test in report.tests()}
    against = "" if reference is None else report.name(reference)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("head", "layer", "test, %", "95 % interval", "parameters", f"p against {against}"):
        table.add_column(title, justify="left" if title in ("head", "layer") else "right", no_wrap=True)
    rows: list[tuple[LayerNeighbours | HeadResult, str, str, Any, int]] = [
        (entry, entry.method, report.layers[entry.layer].name, entry.result.chosen, 0)
        for entry in report.best_neighbours()
    ]
    rows += [(result, result.spec.pooling, result.layer, result.best, _count(result.head)) for result in report.best()]
    for entry, name, layer, score, parameters in rows:
        low, high = (f"{100 * end:.1f}" for end in score.interval) if score else ("–", "–")
        accuracy = percent(score.accuracy) if score else "–"
        last = "" if entry is reference else p.get(report.name(entry), "–")
        table.add_row(name, layer, accuracy, f"{low} to {high}", f"{parameters:,}", last)
    if report.pixels is not None:
        pixel_rows: list[tuple[str, Any, int]] = [
            ("pixels k-NN" + (", standardised" if standardized else ""), result.chosen, 0)
            for standardized, result in report.pixels.neighbours.items()
        ]
        if (linear := report.pixels.linear) is not None:
            pixel_rows.append(("pixels linear", linear.score, linear.parameters))
        for name, score, parameters in pixel_rows:
            low, high = (f"{100 * end:.1f}" for end in score.interval)
            table.add_row(name, "–", percent(score.accuracy), f"{low} to {high}", f"{parameters:,}", "–")
    console.print(table)
    console.print(report.summary())
    for note in report.notes:
        console.print(f"note: {note}")
