"""`visionattn export NAME|CKPT --output F`: a verified ONNX file of a model name or of a weight file."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from timm.models import get_model_input_config
from torch import nn
from torch.optim.swa_utils import update_bn

from visionattn.arguments import whole_number
from visionattn.export.check import print_rows
from visionattn.export.onnx import check_input_size, check_opset, export_onnx
from visionattn.export.retrieval import export_retrieval, pair_paths
from visionattn.export.spec import size_text
from visionattn.files import check_output
from visionattn.opening import has_weights, is_file, open_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="NAME|CKPT", help="name in timm's registry, or a weight file or folder")
    parser.add_argument("--output", required=True, metavar="F.onnx", help="ONNX file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME")
    parser.add_argument(
        "--num-classes", type=whole_number(0), metavar="N", help="classes of NAME, if others than its own"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="height and width of a file of fixed size, and the first that is checked",
    )
    parser.add_argument("--static-size", action="store_true", help="fix height and width in the file")
    parser.add_argument(
        "--batch",
        type=whole_number(1, 2**16),
        metavar="N",
        help="fix the number of images at a time, which is dynamic otherwise, also with --static-size",
    )
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="ONNX operator set (default: 20)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with the model")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0: the file stands and, unless `--no-check` was given, has passed its check.

    Raises:
        VisionAttnError: Anything else; no file is left.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    size = tuple(args.input_size) if args.input_size else None
    if size:
        check_input_size(*size)
    check_opset(args.opset)
    check_output(args.output, args.overwrite, (".onnx",))
    # An untrained model of an architecture is worth a file: it shows size and speed.
    random = args.checkpoint is None and not is_file(args.model) and not has_weights(args.model)
    settings: dict[str, Any] = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model, weights, licence = open_model(args.model, args.checkpoint, random, image_size=size, **settings)
    if random:
        draw_random_weights(model, size)
    note = ", none are published for this name: give your own with --checkpoint FILE" if weights == "random" else ""
    console.print(f"Weights: {weights}{note}.")
    settings = {
        "input_size": size,
        "dynamic_size": False if args.static_size else None,
        "batch": args.batch,
        "opset": args.opset,
        "weights": weights,
        "license": licence,
        "check": not args.no_check,
    }
    retrieval = getattr(model, "task", "") == "retrieve"
    for path in pair_paths(args.output) if retrieval else ():
        check_output(path, args.overwrite)
    with _progress(console) as settings["progress"]:
        if retrieval:
            files = [*export_retrieval(model, args.output, **settings)]
        else:
            files = [export_onnx(model, args.output, **settings)]
    file = files[0]
    rows = [row for written in files for row in written.rows]
    if rows:
        print_rows(rows, console)
    else:
        console.print("Not checked against PyTorch (--no-check).")
    channels, height, width = file.spec.input_size
    if not file.spec.dynamic_size:
        why = "as asked" if args.static_size else "the model takes no other"
        batch = "dynamic: --batch N fixes it" if args.batch is None else f"fixed to {args.batch}"
        console.print(f"Height and width are fixed to {size_text(height, width)}: {why}. The batch is {batch}.")
    for written in files:
        console.print(
            f"Wrote {written.path}: {written.bytes / 1e6:.2f} MB, {written.nodes} nodes, opset {written.spec.opset}, "
            f"dynamic {', '.join(written.spec.dynamic_axes) or 'nothing'}, {written.seconds:.0f} s."
        )
    zeros = ", ".join([f"zeros(({args.batch or 1}, {channels}, {height}, {width}))"] * len(file.spec.input_names))
    name, call = ("OnnxRetrieval", f"OnnxRetrieval({json.dumps(args.output)})({zeros}).shape")
    if not retrieval:
        name, call = ("run", f"run({json.dumps(str(file.path))}, {zeros})")
    code = f"from numpy import zeros; from visionattn.export import {name}; print({call})"
    console.print(f"Next: python -c {shlex.quote(code)}")
    return 0


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What shows the steps of an export: one line that changes in a terminal, a line a step in a log."""
    if not console.is_terminal:
        yield console.print
        return
    with console.status("") as status:
        yield status.update


def draw_random_weights(model: nn.Module, size: tuple[int, int] | None) -> nn.Module:
    """Let the output of an untrained model depend on its image, or the check would prove nothing."""
    # A layer that starts at zero, as classifiers do, would hide everything before it. Branches that end in batch norm
    # stay small: with larger ones, deep networks of random weights amplify rounding beyond what the check allows.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.01)
    # Untrained batch norm does not normalise: over many layers the signal would vanish.
    channels, *default = get_model_input_config(model)["input_size"]
    update_bn([torch.randn(2, channels, *(size or default))], model)
    return model
