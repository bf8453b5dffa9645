"""`flow_files`: optical flow between images, or along a video or a folder of frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visionattn.data.matching.disparity import FLOW_FILES, write_flow
from visionattn.errors import InputError
from visionattn.predict import batch, pairs
from visionattn.predict.batch import Bar, Job, Outcome
from visionattn.predict.colours import flow_colours
from visionattn.predict.flow import match_images
from visionattn.predict.matching import Matcher, open_matcher

__all__ = ["flow_files"]


def flow_files(
    inputs: str | Path | Sequence[str | Path],
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
) -> Outcome:
    """Estimate the optical flow of files, with one line of output per pair.

    Args:
        inputs: Two images, folders or patterns; or one video, folder or pattern of frames.
        output: A file, whose suffix determines the format; or a folder.
        model: See `visionattn.flow`.
        checkpoint: See `visionattn.flow`.
        format: Format of the files in a folder: a suffix of `FLOW_FILES` without the dot; default "flo".
        color: Also write NAME_color.png, a colour image.
        nonocc: Also write NAME_nonocc.png: white where a pixel is not occluded.
        overwrite: Replace existing outputs.
        skip_existing: Keep existing outputs, to resume an interrupted run.
        device: See `visionattn.flow`.
        dtype: See `visionattn.flow`.
        max_pixels: See `visionattn.flow`.
        low_resolution_start: See `visionattn.flow`.
        enlarge: See `visionattn.flow`.

    Returns:
        The written, skipped and failed outputs; a failed pair does not end the run.

    Raises:
        VisionAttnError: The run could not start: an input, the model or the folder is missing.
    """
    named = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    if len(named) not in (1, 2):
        raise InputError(f"Flow takes one or two inputs and an output; got {len(named)} inputs.")
    beside = [name for name, asked in (("color", color), ("nonocc", nonocc)) if asked]
    alone = len(named) == 1
    found, names = (pairs.consecutive(named[0]), []) if alone else pairs.pair_up(named[0], named[1], output)
    jobs = pairs.jobs_of(
        found,
        output,
        format,
        FLOW_FILES[0],
        lambda target: [pairs.image_beside(target, name) for name in beside],
        names,
    )
    matcher = open_matcher(
        "flow",
        model,
        checkpoint,
        device,
        dtype=dtype,
        max_pixels=max_pixels,
        low_resolution_start=low_resolution_start,
        enlarge=enlarge,
    )
    return batch.run(jobs, _Work(matcher, color, nonocc), FLOW_FILES, overwrite=overwrite, skip_existing=skip_existing)


@dataclass
class _Work:
    """Runs the jobs one after the other with a shared matcher."""

    matcher: Matcher
    color: bool
    nonocc: bool

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, match and write, or raise an error. The output is written last: it marks the job as done."""
        with pairs.naming(job):
            return self._video(job, bar) if job.is_video else self._images(job)

    def _images(self, job: Job) -> list[str]:
        first, second = pairs.read_pair(job)
        found = match_images(self.matcher, first.pixels, second.pixels)
        if self.color:
            pairs.beside(job.target, "color", flow_colours(found.flow))
        if self.nonocc:
            pairs.beside(job.target, "nonocc", 255 * found.nonocc.astype(np.uint8))
        write_flow(job.target, found.flow)
        return first.notes + second.notes + found.notes

    def _video(self, job: Job, bar: Bar) -> list[str]:
        notes: dict[str, None] = {}
        before: list[np.ndarray] = []

        def show(frame: np.ndarray, other: np.ndarray | None = None) -> np.ndarray | None:
            if other is None:  # one video: from the previous frame to this one
                before.append(frame)
                if len(before) == 1:
                    return None
                frame, other = before.pop(0), frame
            forward = self.matcher(frame, other)[:2].transpose(1, 2, 0)
            notes.update(dict.fromkeys(self.matcher.notes))
            return flow_colours(forward)

        pairs.convert_pair(job, bar, show)
        if self.nonocc:
            notes["--nonocc: for images only; a video shows the colours of flow"] = None
        return list(notes)
