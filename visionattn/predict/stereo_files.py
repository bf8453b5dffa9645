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
from visionattn.predict.calibration import Calibration
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.depth_files import write_depth, write_point_cloud
from visionattn.predict.images.picture import Picture, write
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown, open_matcher
from visionattn.predict.rectification import describe_rows
from visionattn.predict.stereo import EXCHANGED, StereoMatch, looks_exchanged, match_views, open_calibration
from visionattn.predict.videos.video import VIDEOS

__all__ = ["FORMATS", "PICTURE", "stereo_files"]

FORMATS = (".png", ".pfm", ".npy", ".npz")  # the first is the default in folders
PICTURE = "color"  # the format of what is only looked at
PLACE = Path("disparity")  # of the output where none is named


def stereo_files(
    left: str | Path,
    right: str | Path,
    output: str | Path | None = None,
    model: str | Path | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    format: str | None = None,
    color: bool = False,
    nonocc: bool = False,
    right_disparity: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
    calibration: str | Path | None = None,
    focal: float | None = None,
    fy: float | None = None,
    baseline: float | None = None,
    doffs: float = 0.0,
    ply: bool = False,
    principal_point: tuple[float, float] | None = None,
) -> Outcome:
    """Match stereo pairs of files, with a line for each.

    Args:
        left: Image, video, folder (with its sub-folders) or pattern.
        right: Likewise, of the same names where there are several.
        output: A file, whose suffix says the format; or a folder. Default: a picture for the eye, disparity.png, or
            several in the folder disparity.
        model: See `visionattn.stereo`, as for the arguments that are not here.
        checkpoint: Likewise.
        format: Of the files in a folder: "png" (KITTI's, of 16 bits), "pfm", "npy", "npz", or "color": pictures for the
            eye, also for an output that is a .png. Default "png" in a folder that is named.
        color: Also write NAME_color.png, for the eye.
        nonocc: Also write NAME_nonocc.png: white where both views see it.
        right_disparity: Also write NAME_right, the disparities of the right view.
        overwrite: Replace outputs that exist.
        skip_existing: Leave outputs that exist, which goes on with a run that was stopped.
        device: See `visionattn.stereo`.
        dtype: Likewise.
        max_pixels: Likewise.
        low_resolution_start: Likewise.
        enlarge: Likewise.
        calibration: See `visionattn.stereo`: also write NAME_depth.
        focal: Focal length in pixels: also write NAME_depth.
        fy: Focal length along columns where it is another one, for `ply`.
        baseline: Distance of the cameras in metres, with `focal`, or instead of the file's.
        doffs: See `visionattn.stereo`.
        ply: Also write NAME.ply: points that both views see, coloured.
        principal_point: Column and row in the left view, for `ply`; default its middle.

    Returns:
        What was written, skipped and failed: a pair that cannot be matched does not end the run.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder, or a calibration with a gap.
    """
    cameras = open_calibration(
        calibration, focal, baseline, doffs=doffs, principal_point=principal_point, fy=fy, ply=ply
    )
    found, names = pairs.pair_up(left, right, output)
    as_picture = format == PICTURE or output is None
    if output is None:
        output = PLACE if found[1] else PLACE.with_suffix(_suffix_of(found[0][0][0]))
    if as_picture:
        format = "png" if found[1] or Path(output).suffix.lower() != ".png" else None
    work = _Work(as_picture, color and not as_picture, nonocc, right_disparity, cameras, ply)
    jobs = pairs.jobs_of(found, output, format, FORMATS[0], work.files_beside, names)
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


def _suffix_of(source: Path) -> str:
    """Of the output where none is named."""
    return source.suffix if source.suffix.lower() in VIDEOS else ".png"


@dataclass
class _Work:
    """Does one job after the other with what they share; its `matcher` is set once the jobs are known."""

    as_picture: bool
    color: bool
    nonocc: bool
    right_disparity: bool
    cameras: Calibration | None
    ply: bool

    matcher: Matcher = field(init=False)

    def files_beside(self, target: Path) -> list[Path]:
        """What is written beside an output."""
        images = [pairs.image_beside(target, name) for name in ("color", "nonocc") if getattr(self, name)]
        right = [_beside(target, "right")] if self.right_disparity else []
        right += [pairs.image_beside(target, "right_color")] if right and self.color else []
        depth = [] if self.cameras is None else [_beside(target, "depth")]
        return images + right + depth + ([target.with_suffix(".ply")] if self.ply else [])

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, match, write; or raise what keeps it from that. The output comes last: with it, the job is done."""
        with pairs.naming(job):
            return self._video(job, bar) if job.is_video else self._images(job)

    def _images(self, job: Job) -> list[str]:
        left, right = pairs.read_pair(job)
        found = match_views(self.matcher, left.pixels, right.pixels, self.cameras)
        notes = left.notes + right.notes + found.notes
        if self.nonocc:
            pairs.beside(job.target, "nonocc", 255 * found.nonocc.astype(np.uint8))
        if found.depth is not None:
            notes += self._write_depth(job.target, found, left.pixels)
        if self.right_disparity:
            self._write(_beside(job.target, "right"), found.right)
        self._write(job.target, found.disparity)
        return notes

    def _write(self, target: Path, disparity: np.ndarray) -> None:
        """Write disparities as a picture, or as numbers and perhaps a picture beside them."""
        colours = disparity_colours(disparity) if self.as_picture or self.color else None
        if colours is not None:
            write(target if self.as_picture else pairs.image_beside(target, "color"), Picture(colours))
        if not self.as_picture:
            write_disparity(target, disparity)

    def _write_depth(self, target: Path, found: StereoMatch, left: np.ndarray) -> list[str]:
        assert self.cameras is not None
        assert found.depth is not None
        notes = write_depth(_beside(target, "depth"), found.depth)
        if self.ply:
            cameras = self.cameras.at(*left.shape[:2])
            colours = np.rint(255 * as_tensor(left)[0].movedim(0, 2).numpy()).astype(np.uint8)
            points = np.where(found.nonocc, found.depth, np.nan)
            write_point_cloud(
                target.with_suffix(".ply"), points, colours, cameras.focal, cameras.principal_point, cameras.fy
            )
        return notes

    def _video(self, job: Job, bar: Bar) -> list[str]:
        notes: dict[str, None] = {}
        top: list[float] = []  # the colours of all frames mean the same
        unknown: list[float] = []

        def show(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            if not top:
                notes.update(dict.fromkeys([EXCHANGED] if looks_exchanged(left, right) else describe_rows(left, right)))
            disparity = self.matcher(left, right)[0]
            notes.update(dict.fromkeys(self.matcher.notes))
            unknown.append(self.matcher.unknown)
            if not top:
                top.append(usual_top(disparity))
            return disparity_colours(disparity, top[0])

        pairs.convert_pair(job, bar, show)
        return [*notes, *describe_unknown(sum(unknown) / max(len(unknown), 1)), *self._left_out()]

    def _left_out(self) -> list[str]:
        given = {"nonocc": self.nonocc, "right": self.right_disparity, "focal": self.cameras, "ply": self.ply}
        asked = [f"--{name}" for name, value in given.items() if value]
        return [f"{', '.join(asked)}: of images only, a video shows the colours of disparity"] if asked else []


def _beside(target: Path, name: str) -> Path:
    """Where numbers next to an output stand, in its format."""
    return target.with_stem(f"{target.stem}_{name}")
