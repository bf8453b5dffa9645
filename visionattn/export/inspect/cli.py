"""`visionattn check FILE`: check the structure of an ONNX file, where it runs, and its cost."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext

from rich.console import Console

from visionattn.arguments import whole_number
from visionattn.errors import shorten
from visionattn.export.check import print_rows
from visionattn.export.inspect import FileCheck, check
from visionattn.files import atomic_path, check_output

__all__ = ["add_arguments", "run"]

SHOWN = 12  # the most frequent operators


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="ONNX file, written by this package or by another tool")
    parser.add_argument("--model", metavar="NAME|CKPT", help="model that it was exported from, for comparison")
    parser.add_argument(
        "--checkpoint", metavar="CKPT", help="weights for --model; enough on its own if it names its model"
    )
    parser.add_argument(
        "--image-size",
        type=whole_number(1, 2**14),
        nargs=2,
        metavar=("H", "W"),
        help="height and width of the first run",
    )
    parser.add_argument("--json", metavar="F.json", help="also write the result to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing JSON file")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if the file has problems.

    Raises:
        VisionAttnError: The file, or the model, cannot be read.
    """
    if args.json is not None:
        check_output(args.json, args.overwrite, (".json",))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with console.status("Checking") if console.is_terminal else nullcontext():
        found = check(
            args.file,
            model=args.model,
            checkpoint=args.checkpoint,
            image_size=args.image_size and tuple(args.image_size),
            progress=console.print if console.is_terminal else None,
        )
    for line in describe(found):
        console.print(line)
    if found.comparison:
        print_rows(found.comparison, console)
    if args.json is not None:
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"Wrote {args.json}.")
    return 0 if found.passed else 1


def describe(found: FileCheck) -> list[str]:
    """The result as lines of text."""
    structure = found.structure
    operators = [f"{name} {count}" for name, count in structure.operators.items()]
    more = [f"{len(operators) - SHOWN} more"] if len(operators) > SHOWN else []
    opsets = ", ".join(f"{domain} {number}".strip() for domain, number in structure.opsets.items())
    lines = [
        f"{found.path}: {found.bytes / 1e6:.2f} MB, {structure.weights / 1e6:.2f} MB of weights, opset {opsets}, "
        f"IR {structure.ir_version}, by {shorten(structure.producer) or 'an unknown tool'}",
        *(f"  in   {shorten(value)}" for value in structure.inputs),
        *(f"  out  {shorten(value)}" for value in structure.outputs),
        f"  {structure.nodes} nodes, tensors of up to {structure.highest_rank} axes: "
        + ", ".join(operators[:SHOWN] + more),
    ]
    if structure.custom_domains:
        lines.append(f"  operators outside of ONNX: {shorten(', '.join(structure.custom_domains))}")
    if structure.external_data:
        lines.append(f"  weights in {shorten(', '.join(structure.external_data))}")
    lines.append("Metadata" if found.metadata else "Metadata: none")
    lines += [f"  {shorten(key, 40)}: {shorten(value)}" for key, value in found.metadata.items()]
    lines += ["Sizes", *(f"  {'FAIL' if run.fault else 'runs'}  {run}" for run in found.runs)] if found.runs else []
    lines += ["Supported operators on phones and in browsers", *(f"  {target}" for target in found.targets)]
    lines += ["Cost, one image of the first size", *(f"  {cost}" for cost in found.costs)] if found.costs else []
    lines += [f"Problem: {problem}" for problem in found.problems]
    return lines + ["No problems found."] * found.passed
