"""`visionattn flow FIRST SECOND OUT`: the arguments of `flow_files`."""

from __future__ import annotations

import argparse

from visionattn.arguments import call_with
from visionattn.data.matching.disparity import FLOW_FILES
from visionattn.predict.arguments import add_matching_arguments
from visionattn.predict.batch import keep_freed_memory
from visionattn.predict.flow_files import flow_files

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "inputs",
        metavar="input",
        nargs="+",
        help="two images, folders or patterns; or one video, folder or pattern of frames",
    )
    parser.add_argument("output", help=f"file ({', '.join(FLOW_FILES)}; a video for videos), or folder")
    add_matching_arguments(parser, FLOW_FILES)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if every output was written or skipped as requested, 1 otherwise.

    Raises:
        VisionAttnError: The run could not start: an input, the model or the folder is missing.
    """
    keep_freed_memory()
    return call_with(flow_files, args).exit_code
