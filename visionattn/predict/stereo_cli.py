"""`visionattn stereo LEFT RIGHT [OUT]`: the arguments of `stereo_files`."""

from __future__ import annotations

import argparse
import sys

from visionattn.arguments import call_with, number
from visionattn.predict.arguments import add_matching_arguments
from visionattn.predict.batch import keep_freed_memory
from visionattn.predict.stereo_files import FORMATS, PICTURE, PLACE, stereo_files

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("left", help="image, video, folder with its sub-folders, or pattern")
    parser.add_argument("right", help="the same for the right view, with the same names if there are several")
    parser.add_argument(
        "output",
        nargs="?",
        help=f"file ({', '.join(FORMATS)} for values; a video for videos) or folder (default: image {PLACE}.png)",
    )
    add_matching_arguments(parser, FORMATS, PICTURE)
    parser.add_argument(
        "--fill",
        action="store_true",
        help="replace disparities that fail the left-right consistency check, and smooth all; needs OpenCV",
    )
    parser.add_argument(
        "--right",
        dest="right_disparity",
        action="store_true",
        help="also write NAME_right: disparities of the right view",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="calibration of Middlebury, KITTI or OpenCV: also write NAME_depth, in metres",
    )
    parser.add_argument("--focal", type=number(high=1e6), metavar="PIXELS", help="focal length: also write NAME_depth")
    parser.add_argument("--fx", dest="focal", type=number(high=1e6), metavar="PIXELS", help="the same as --focal")
    parser.add_argument(
        "--fy", type=number(high=1e6), metavar="PIXELS", help="focal length along columns, for --ply (default: --focal)"
    )
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
    parser.add_argument(
        "--ply", action="store_true", help="also write NAME.ply: point cloud of the non-occluded pixels, coloured"
    )
    parser.add_argument(
        "--principal-point",
        type=number(-1e6, 1e6),
        nargs=2,
        metavar=("X", "Y"),
        help="principal point of the left view, for --ply (default: its centre)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if every output was written or skipped as requested, 1 otherwise.

    Raises:
        VisionAttnError: The run could not start: an input, the model, the folder or a calibration value is missing.
    """
    keep_freed_memory()
    outcome = call_with(stereo_files, args)
    of_numbers = args.output is not None and args.format != PICTURE and not args.color
    if of_numbers and any(path.suffix.lower() == ".png" for path in outcome.written):
        print(
            "visionattn: note: a named .png output contains disparities times 256 in 16 bits, which look dark; --color "
            f"adds a colour image, --format {PICTURE} or no output writes only that.",
            file=sys.stderr,
        )
    return outcome.exit_code
