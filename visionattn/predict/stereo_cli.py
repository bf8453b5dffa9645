"""`visionattn stereo LEFT RIGHT OUT`: disparity, depth and point clouds of rectified stereo pairs."""

from __future__ import annotations

import argparse

import numpy as np

from visionattn.arguments import number
from visionattn.data.matching.disparity import write_disparity
from visionattn.errors import InputError
from visionattn.predict import batch, pairs
from visionattn.predict.batch import Bar, Job
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.depth_files import write_depth, write_point_cloud
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown
from visionattn.predict.stereo import depth, looks_exchanged, seen_in_both

__all__ = ["add_arguments", "run"]

DEFAULT = "va_match_stereo_nano"
FORMATS = (".png", ".pfm", ".npy", ".npz")  # the first is the default in folders
EXCHANGED = (
    "its matches lie to the right, so that left and right seem to be exchanged: the result is of no use if they are"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("left", help="image, video, folder or pattern")
    parser.add_argument("right", help="likewise, of the same names where there are several")
    parser.add_argument("output", help=f"file ({', '.join(FORMATS)}; a video for videos), or folder")
    pairs.add_arguments(parser, FORMATS)
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
    _check_calibration(args)
    batch.keep_freed_memory()
    jobs = pairs.pair_up(args.left, args.right, args, FORMATS[0])
    return batch.run(jobs, _Work(args, pairs.open_matcher(args, "stereo", DEFAULT)).do, FORMATS, args)


def _check_calibration(args: argparse.Namespace) -> None:
    if (args.focal is None) != (args.baseline is None):
        given, lacking = ("--focal", "--baseline") if args.baseline is None else ("--baseline", "--focal")
        raise InputError(f"{given} without {lacking}: depth is focal length times baseline by disparity. Give both.")
    if args.focal is None:
        for name in ("ply", "doffs", "principal_point"):
            if getattr(args, name):
                raise InputError(f"--{name.replace('_', '-')} needs --focal and --baseline.")
    else:
        depth(np.ones((1, 1)), args.focal, args.baseline)  # which says what is wrong with their values


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
        left, right = pairs.read_pair(job)
        notes = left.notes + right.notes
        if looks_exchanged(left.pixels, right.pixels):
            notes.append(EXCHANGED)
        found = self.matcher(left.pixels, right.pixels)
        notes += describe_unknown(self.matcher.unknown)
        disparity, seen = found[0], seen_in_both(found)
        if self.args.color:
            pairs.beside(job.target, "color", disparity_colours(disparity))
        if self.args.nonocc:
            pairs.beside(job.target, "nonocc", 255 * seen.astype(np.uint8))
        if self.args.focal:
            metres = depth(disparity, self.args.focal, self.args.baseline, self.args.doffs)
            behind = (np.isfinite(disparity) & ~np.isfinite(metres)).mean()
            if behind:
                notes.append(
                    f"{behind:.1%} have a disparity and no depth: disparity and --doffs together are not above 0"
                )
            notes += write_depth(pairs.depth_file(job.target), metres)
            if self.args.ply:
                colours = np.rint(255 * as_tensor(left.pixels)[0].movedim(0, 2).numpy()).astype(np.uint8)
                points = np.where(seen, metres, np.nan)
                path = pairs.cloud_file(job.target)
                write_point_cloud(path, points, colours, self.args.focal, self.args.principal_point)
        write_disparity(job.target, disparity)
        return notes + self.matcher.notes

    def _video(self, job: Job, bar: Bar) -> list[str]:
        notes: dict[str, None] = {}
        top: list[float] = []  # the colours of all frames mean the same
        unknown: list[float] = []

        def show(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            if not top and looks_exchanged(left, right):
                notes[EXCHANGED] = None
            disparity = self.matcher(left, right)[0]
            notes.update(dict.fromkeys(self.matcher.notes))
            unknown.append(self.matcher.unknown)
            if not top:
                top.append(usual_top(disparity))
            return disparity_colours(disparity, top[0])

        pairs.convert_pair(job, bar, show)
        return [*notes, *describe_unknown(sum(unknown) / max(len(unknown), 1)), *self._left_out()]

    def _left_out(self) -> list[str]:
        asked = [f"--{name}" for name in ("nonocc", "focal", "ply") if getattr(self.args, name)]
        return [f"{', '.join(asked)}: of images only, a video shows the colours of disparity"] if asked else []
