"""`visionattn export NAME|CKPT --output F`: export a model to a verified ONNX file, or to a folder with `--bundle`.

`--head` is run by `visionattn.probe.export_cli`, which opens the head and its backbone.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console

from visionattn.arguments import add_old_spelling, number, whole_number
from visionattn.errors import InputError
from visionattn.export.api import export
from visionattn.export.budget import TIME_LIMIT
from visionattn.export.check import print_rows
from visionattn.export.formats import FORMATS
from visionattn.export.onnx import OnnxFile
from visionattn.export.spec import size_text
from visionattn.export.variants import print_variants

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="NAME|CKPT",
        help="name in timm's registry, or a weight file or folder; with --head the backbone, if it has moved",
    )
    parser.add_argument(
        "--head", metavar="FILE", help="head that `visionattn probe` saved: it and its backbone become one file"
    )
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("--output", metavar="F.onnx", help="file to write: .onnx, .ort or .pt2")
    written.add_argument(
        "--bundle",
        metavar="FOLDER",
        help="folder to write: the files with a card, licence, sample and a runner that does not need PyTorch",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME")
    parser.add_argument(
        "--num-classes", type=whole_number(0), metavar="N", help="number of classes for NAME (default: the model's)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="height and width of a file of fixed size, and the size around which it is checked",
    )
    add_old_spelling(parser, "--input-size", "--image-size")
    parser.add_argument("--static-size", action="store_true", help="fix height and width in the file")
    parser.add_argument(
        "--batch",
        type=whole_number(1, 2**16),
        metavar="N",
        help="fixed batch size (default: dynamic, also with --static-size)",
    )
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="ONNX operator set (default: 20)")
    parser.add_argument(
        "--int8",
        nargs="?",
        const=True,
        default=False,
        metavar="FOLDER",
        help="also write F.int8.onnx, calibrated on the images or stereo scenes in FOLDER (default: images from "
        "installed packages)",
    )
    parser.add_argument("--fp16", action="store_true", help="also write F.fp16.onnx")
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="take uint8 images and return images, probabilities or disparities",
    )
    parser.add_argument(
        "--pad-channels",
        action="store_true",
        help="pad channels of convolutions to a multiple of 4: the same outputs, faster on CPUs, slower in browsers",
    )
    parser.add_argument(
        "--test-data",
        metavar="FOLDER",
        help="real data to measure variants on: high-resolution images, one folder per class, or stereo scenes "
        "(default: the calibration data)",
    )
    parser.add_argument("--format", choices=FORMATS, help="format of the files (default: by the suffix of --output)")
    parser.add_argument(
        "--random-weights", action="store_true", help="use random weights for NAME, even if pretrained ones exist"
    )
    parser.add_argument(
        "--time-limit",
        type=number(0, above=True),
        default=TIME_LIMIT,
        metavar="SECONDS",
        help=f"maximum CPU time for tracing, translating and checking (default: {TIME_LIMIT:.0f})",
    )
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with the model")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0: all files are written and, unless `--no-check` was given, have passed their check; 1: a variant lost too much
        accuracy and was not written, or the time limit left a part of the check out.

    Raises:
        VisionAttnError: Any other failure; no file is left behind.
    """
    if args.model is None:
        raise InputError("A model is required: its name, a weight file, or --head FILE for a probed backbone.")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    settings: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        "num_classes": args.num_classes,
        "image_size": args.image_size and tuple(args.image_size),
        "static_size": args.static_size,
        "batch": args.batch,
        "opset": args.opset,
        "int8": args.int8,
        "fp16": args.fp16,
        "preprocess": args.preprocess,
        "pad_channels": args.pad_channels,
        "test_data": args.test_data,
        "time_limit": args.time_limit,
        "overwrite": args.overwrite,
        "progress": console.print,
    }
    with console.status("Exporting") if console.is_terminal else nullcontext():
        if args.bundle is not None:
            return _write_bundle(args, settings, console)
        settings |= {"format": args.format, "check": not args.no_check, "random_weights": args.random_weights}
        files = export(args.model, args.output, **settings)
    _tell(args, files, console)
    if files[0].variants:
        print_variants(files[0].variants, console)
    console.print(f"Next: python -c {shlex.quote(_example(files, args.output))}")
    cut = not args.no_check and any(file.spec.unchecked for file in files)
    return 1 if cut or any(variant.refused for variant in files[0].variants) else 0


def _write_bundle(args: argparse.Namespace, settings: dict[str, Any], console: Console) -> int:
    if args.format is not None or args.no_check or args.random_weights:
        raise InputError(
            "A bundle contains checked ONNX files with trained weights: leave out --format, --no-check and "
            "--random-weights."
        )
    from visionattn.export.bundle import export_bundle  # needs ONNX Runtime

    bundle = export_bundle(args.model, args.bundle, **settings)
    _tell(args, bundle.files, console)
    if bundle.files[0].variants:
        print_variants(bundle.files[0].variants, console)
    for row in bundle.rows[len(bundle.card["files"]) :]:
        console.print(f"pass  {row.file} {row.finding}")
    console.print(f"Wrote {bundle.folder}: {len(bundle.card['files'])} files and their card.")
    console.print(f"Next: python {shlex.quote(str(bundle.folder / 'run.py'))} --verify")
    return 1 if any(variant.refused for variant in bundle.files[0].variants) else 0


def _tell(args: argparse.Namespace, files: Sequence[OnnxFile], console: Console) -> None:
    """Say what was checked and written."""
    file = files[0]
    rows = [row for written in files for row in written.rows]
    unchecked = [
        size if len(files) == 1 else f"{', '.join(written.spec.output_names)} at {size}"
        for written in files
        for size in written.spec.unchecked or ()
    ]
    if rows:
        is_program = file.path.suffix.lower() == ".pt2"
        print_rows(rows, console, unchecked, "Program of torch.export" if is_program else "ONNX Runtime")
        if unchecked:
            console.print(
                f"Checked in part: within {args.time_limit:,.10g} s of CPU time, these were not compared with PyTorch: "
                f"{', '.join(unchecked)}. Raise the limit with --time-limit, or check smaller sizes with --image-size."
            )
    else:
        console.print("Not checked against PyTorch (--no-check).")
    _, height, width = file.spec.input_size
    if not file.spec.dynamic_size:
        why = "as asked" if args.static_size else "the model takes no other"
        batch = "dynamic: --batch N fixes it" if args.batch is None else f"fixed to {args.batch}"
        console.print(f"Height and width are fixed to {size_text(height, width)}: {why}. The batch is {batch}.")
    for written in files:
        console.print(
            f"Wrote {written.path}: {written.bytes / 1e6:.2f} MB, {written.nodes} nodes, opset {written.spec.opset}, "
            f"dynamic {', '.join(written.spec.dynamic_axes) or 'nothing'}, {written.seconds:.0f} s."
        )


def _example(files: Sequence[OnnxFile], output: str) -> str:
    """Code that runs what was written."""
    file, spec = files[0], files[0].spec
    channels, height, width = spec.input_size
    shape = f"{spec.batch or 1}, {channels}, {height}, {width}"
    if spec.input_type == "uint8":
        shape = f"{spec.batch or 1}, {height}, {width}, {channels}"
    kind = ", 'uint8'" if spec.input_type == "uint8" else ""
    zeros = ", ".join([f"zeros(({shape}){kind})"] * len(spec.input_names))
    if len(files) > 1:
        call = f"OnnxRetrieval({json.dumps(output)})({zeros}).shape"
        return f"from numpy import zeros; from visionattn.export import OnnxRetrieval; print({call})"
    if file.path.suffix.lower() == ".pt2":
        return f"from torch import export, zeros; print(export.load({json.dumps(str(file.path))}).module()({zeros}))"
    call = f"run({json.dumps(str(file.path))}, {zeros})"
    return f"from numpy import zeros; from visionattn.export import run; print({call})"
