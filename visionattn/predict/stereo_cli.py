"""`visionattn stereo LEFT RIGHT OUT`: the arguments of `stereo_files`."""

from __future__ import annotations

import argparse

from visionattn.arguments import call_with, number
from visionattn.predict.arguments import add_matching_arguments
from visionattn.predict.batch import keep_freed_memory
from visionattn.predict.stereo_files import FORMATS, stereo_files

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("left", help="image, video, folder or pattern")
    parser.add_argument("right", help="likewise, of the same names where there are several")
    parser.add_argument("output", help=f"file ({', '.join(FORMATS)}; a video for videos), or folder")
    add_matching_arguments(parser, FORMATS)
    parser.add_argument("--focal", type=number(high=1e6), metavar="PIXELS", help="focal length: also write NAME_depth")
    parser.add_argument(
        "--baseline", type=number(high=1e6), metavar="METRES", help="distance of the cameras, with --focal"
    )
    parser.add_argument(
        "--doffs",
        type=number(-1e6, 1e6),
        default=0.0,
        metavar="PIXELS",
        help="difference of the principal points (default: 0)",
    )
    parser.add_argument("--ply", action="store_true", help="also write NAME.ply: points that both views see, coloured")
    parser.add_argument(
        "--principal-point",
        type=number(-1e6, 1e6),
        nargs=2,
        metavar=("X", "Y"),
        help="of the left view, for --ply (default: its middle)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 when every output was written or skipped as asked, 1 when some were not.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder, or a calibration with a gap.
    """
    keep_freed_memory()
    return call_with(stereo_files, args).exit_code
