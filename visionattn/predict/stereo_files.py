"""`stereo_files`: disparity, depth and point clouds of rectified stereo pairs, of files, folders and videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visionattn.data.matching.disparity import write_disparity
from visionattn.predict import batch, pairs
from visionattn.predict.batch import Bar, Job, Outcome
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.depth_files import write_depth, write_point_cloud
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown, open_matcher
from visionattn.predict.stereo import EXCHANGED, check_calibration, looks_exchanged, match_views

__all__ = ["FORMATS", "stereo_files"]

FORMATS = (".png", ".pfm", ".npy", ".npz")  # the first is the default in folders


def stereo_files(
    left: str | Path,
    right: str | Path,
    output: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    format: str | None = None,
    color: bool = False,
    nonocc: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
    focal: float | None = None,
    baseline: float | None = None,
    doffs: float = 0.0,
    ply: bool = False,
    principal_point: tuple[float, float] | None = None,
) -> Outcome:
    """Match stereo pairs of files, with a line for each.

    Args:
        left: Image, video, folder or pattern.
        right: Likewise, of the same names where there are several.
        output: A file, whose suffix says the format; or a folder.
        model: See `visionattn.stereo`, as for the arguments that are not here.
        checkpoint: Likewise.
        format: Of the files in a folder: "png", "pfm", "npy" or "npz"; default "png".
        color: Also write NAME_color.png, for the eye.
        nonocc: Also write NAME_nonocc.png: white where both views see it.
        overwrite: Replace outputs that exist.
        skip_existing: Leave outputs that exist, which goes on with a run that was stopped.
        device: See `visionattn.stereo`.
        dtype: Likewise.
        max_pixels: Likewise.
        low_resolution_start: Likewise.
        enlarge: Likewise.
        focal: Focal length in pixels: also write NAME_depth.
        baseline: Distance of the cameras in metres, with `focal`.
        doffs: See `visionattn.stereo`.
        ply: Also write NAME.ply: points that both views see, coloured.
        principal_point: Column and row in the left view, for `ply`; default its middle.

    Returns:
        What was written, skipped and failed: a pair that cannot be matched does not end the run.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder, or a calibration with a gap.
    """
    check_calibration(focal, baseline, ply=ply, doffs=doffs, principal_point=principal_point)
    work = _Work(color, nonocc, focal, baseline, doffs, ply, principal_point)
    jobs = pairs.jobs_of(pairs.pair_up(left, right), output, format, FORMATS[0], work.files_beside)
    work.matcher = open_matcher(
        "stereo",
        model,
        checkpoint,
        device,
        dtype=dtype,
        max_pixels=max_pixels,
        low_resolution_start=low_resolution_start,
        enlarge=enlarge,
    )
    return batch.run(jobs, work, FORMATS, overwrite=overwrite, skip_existing=skip_existing)


@dataclass
class _Work:
    """Does one job after the other with what they share; its `matcher` is set once the jobs are known."""

    color: bool
    nonocc: bool
    focal: float | None
    baseline: float | None
    doffs: float
    ply: bool
    principal_point: tuple[float, float] | None

    matcher: Matcher = field(init=False)

    def files_beside(self, target: Path) -> list[Path]:
        """What is written beside an output."""
        images = [pairs.image_beside(target, name) for name in ("color", "nonocc") if getattr(self, name)]
        depth = [] if self.focal is None else [_depth_file(target)]
        return images + depth + ([target.with_suffix(".ply")] if self.ply else [])

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, match, write; or raise what keeps it from that. The output comes last: with it, the job is done."""
        with pairs.naming(job):
            return self._video(job, bar) if job.is_video else self._images(job)

    def _images(self, job: Job) -> list[str]:
        left, right = pairs.read_pair(job)
        found = match_views(self.matcher, left.pixels, right.pixels, self.focal, self.baseline, self.doffs)
        notes = left.notes + right.notes + found.notes
        if self.color:
            pairs.beside(job.target, "color", disparity_colours(found.disparity))
        if self.nonocc:
            pairs.beside(job.target, "nonocc", 255 * found.nonocc.astype(np.uint8))
        if found.depth is not None:
            notes += write_depth(_depth_file(job.target), found.depth)
            if self.ply:
                assert self.focal is not None
                colours = np.rint(255 * as_tensor(left.pixels)[0].movedim(0, 2).numpy()).astype(np.uint8)
                points = np.where(found.nonocc, found.depth, np.nan)
                write_point_cloud(job.target.with_suffix(".ply"), points, colours, self.focal, self.principal_point)
        write_disparity(job.target, found.disparity)
        return notes

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
        asked = [f"--{name}" for name in ("nonocc", "focal", "ply") if getattr(self, name)]
        return [f"{', '.join(asked)}: of images only, a video shows the colours of disparity"] if asked else []


def _depth_file(target: Path) -> Path:
    return target.with_stem(f"{target.stem}_depth")
