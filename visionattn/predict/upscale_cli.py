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
    parser.add_argument("output", help="file, or folder for several inputs; the suffix says the format")
    add_model_arguments(parser, "name of the zoo, weight file or exported .onnx")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="pick our model of that factor (default: 4)")
    for side, other in (("width", "height"), ("height", "width")):
        parser.add_argument(
            f"--{side}", type=whole_number(1), metavar="PIXELS", help=f"of the result; with --{other}, at most"
        )
    names = [suffix[1:] for suffix in FORMATS]
    parser.add_argument("--format", choices=names, help="of the images in a folder (default: their own)")
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="N", help="of JPEG and WebP, to 100 (default: 95)"
    )
    add_output_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="also write bicubic and network side by side")
    parser.add_argument("--memory", type=float, metavar="MIB", help="memory of a pass; larger pictures are tiled")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles (default: the model's radius, exact)")
    add_computing_arguments(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="auto: the faster, in long runs")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 when every picture was written or skipped as asked, 1 when some were not.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder.
    """
    keep_freed_memory()
    return call_with(upscale_files, args).exit_code
