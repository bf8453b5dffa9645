"""`visionattn upscale IN... OUT`: the arguments of `upscale_files`."""

from __future__ import annotations

import argparse

from visionattn.arguments import call_with, whole_number
from visionattn.predict.arguments import add_computing_arguments, add_model_arguments, add_output_arguments
from visionattn.predict.batch import keep_freed_memory
from visionattn.predict.engine import ENGINES, default_name
from visionattn.predict.images.picture import READABLE
from visionattn.predict.restore_files import FORMATS, upscale_files
from visionattn.predict.videos.video import VIDEOS

__all__ = ["add_arguments", "default_name", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    formats = ", ".join(suffix[1:] for suffix in (*READABLE, *VIDEOS))
    parser.add_argument("inputs", metavar="input", nargs="+", help=f"files, folders or patterns ({formats})")
    parser.add_argument("output", help="file, or folder for several inputs; the suffix determines the format")
    add_model_arguments(parser, "name of the zoo, weight file or exported .onnx")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="factor of the shipped model (default: 4)")
    for side, other in (("width", "height"), ("height", "width")):
        parser.add_argument(
            f"--{side}", type=whole_number(1), metavar="PIXELS", help=f"{side} of the result; with --{other}, at most"
        )
    names = [suffix[1:] for suffix in FORMATS]
    parser.add_argument("--format", choices=names, help="format of the images in a folder (default: that of the input)")
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="N", help="quality of JPEG and WebP, 1 to 100 (default: 95)"
    )
    add_output_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="also write bicubic and network side by side")
    parser.add_argument(
        "--memory", type=float, metavar="MIB", help="memory of a forward pass; larger images are split into tiles"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="overlap of tiles (default: the model's radius, exact)"
    )
    add_computing_arguments(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="auto: the faster one in long runs")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if every image was written or skipped as requested, 1 otherwise.

    Raises:
        VisionAttnError: The run could not start: an input, the model or the folder is missing.
    """
    keep_freed_memory()
    return call_with(upscale_files, args).exit_code
