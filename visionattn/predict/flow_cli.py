"""`visionattn flow FIRST SECOND OUT`: optical flow between images, or along a video or a folder of frames."""

from __future__ import annotations

import argparse

import numpy as np

from visionattn.data.matching.disparity import FLOW_FILES, write_flow
from visionattn.errors import InputError
from visionattn.predict import batch, pairs
from visionattn.predict.batch import Bar, Job
from visionattn.predict.colours import flow_colours
from visionattn.predict.flow import flow_seen_in_both
from visionattn.predict.matching import Matcher

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "input", nargs="+", help="two images, folders or patterns; or one video, folder or pattern of frames"
    )
    parser.add_argument("output", help=f"file ({', '.join(FLOW_FILES)}; a video for videos), or folder")
    pairs.add_arguments(parser, FLOW_FILES)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 when every output was written or skipped as asked, 1 when some were not.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder.
    """
    batch.keep_freed_memory()
    if len(args.input) == 1:
        jobs = pairs.consecutive(args.input[0], args, FLOW_FILES[0])
    elif len(args.input) == 2:
        jobs = pairs.pair_up(args.input[0], args.input[1], args, FLOW_FILES[0])
    else:
        raise InputError(f"Flow takes one input or two and an output, but there are {len(args.input)} inputs.")
    return batch.run(jobs, _Work(args, pairs.open_matcher(args, "flow", None)).do, FLOW_FILES, args)


class _Work:
    """Does one job after the other with what they share."""

    def __init__(self, args: argparse.Namespace, matcher: Matcher) -> None:
        self.args = args
        self.matcher = matcher

    def do(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, match, write; or raise what keeps it from that. The output comes last: with it, the job is done."""
        with pairs.naming(job):
            return self._video(job, bar) if job.is_video else self._images(job)

    def _images(self, job: Job) -> list[str]:
        first, second = pairs.read_pair(job)
        found = self.matcher(first.pixels, second.pixels)
        forward = found[:2].transpose(1, 2, 0)
        if self.args.color:
            pairs.beside(job.target, "color", flow_colours(forward))
        if self.args.nonocc:
            pairs.beside(job.target, "nonocc", 255 * flow_seen_in_both(found).astype(np.uint8))
        write_flow(job.target, forward)
        return first.notes + second.notes + self.matcher.notes

    def _video(self, job: Job, bar: Bar) -> list[str]:
        notes: dict[str, None] = {}
        before: list[np.ndarray] = []

        def show(frame: np.ndarray, other: np.ndarray | None = None) -> np.ndarray | None:
            if other is None:  # one video: from the frame before to this one
                before.append(frame)
                if len(before) == 1:
                    return None
                frame, other = before.pop(0), frame
            forward = self.matcher(frame, other)[:2].transpose(1, 2, 0)
            notes.update(dict.fromkeys(self.matcher.notes))
            return flow_colours(forward)

        pairs.convert_pair(job, bar, show)
        if self.args.nonocc:
            notes["--nonocc: of images only, a video shows the colours of flow"] = None
        return list(notes)
