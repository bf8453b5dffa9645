"""`visionattn evaluate sr MODEL_OR_CHECKPOINT... --data FOLDER`: models measured by their benchmark's protocol."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from visionattn.evaluate.sr import DTYPES, super_resolution

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the protocols and their arguments."""
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    sr = protocols.add_parser("sr", help="super-resolution: PSNR and SSIM on Y, bicubic beside")
    sr.add_argument(
        "models", nargs="*", metavar="MODEL_OR_CHECKPOINT", help="names with weights, or weight files; none: bicubic"
    )
    sr.add_argument("--data", required=True, metavar="FOLDER", help="large pictures")
    sr.add_argument("--lr", metavar="FOLDER", help="small pictures of the same names (default: MATLAB's bicubic)")
    sr.add_argument("--scale", type=int, metavar="R", help="factor (default: the models')")
    sr.add_argument("--output", type=Path, metavar="CSV", help="file for every row")
    sr.add_argument("--device", default="cpu", help="where models run, such as cuda (default: cpu)")
    sr.add_argument("--dtype", default="float32", choices=DTYPES, help="precision (default: float32)")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 where some pictures could not be measured; each is named on the error output.

    Raises:
        VisionAttnError: Nothing could be measured.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = super_resolution(
        args.models,
        args.data,
        small_folder=args.lr,
        scale=args.scale,
        device=args.device,
        dtype=args.dtype,
        console=console if sys.stdout.isatty() else None,
    )
    if found.rows:
        console.print(f"PSNR / SSIM on Y, {found.folder}, scale {found.rows[0].scale}", soft_wrap=True)
        console.print(found.table())
    if found.rows and args.output is not None:
        found.write(args.output)
        console.print(f"The rows are in {args.output}.")
    for failure in found.failures:
        print(f"visionattn: {failure}", file=sys.stderr)
    return int(bool(found.failures))
