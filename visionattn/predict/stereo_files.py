"""`stereo_files`: disparity, depth and point clouds of rectified stereo pairs in files, folders and videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visionattn.data.matching.disparity import write_disparity
from visionattn.errors import require
from visionattn.predict import batch, pairs
from visionattn.predict.batch import Bar, Job, Outcome
from visionattn.predict.calibration import Calibration
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.depth_files import write_depth, write_point_cloud
from visionattn.predict.filling import fill_left
from visionattn.predict.images.picture import Picture, write
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown, open_matcher
from visionattn.predict.rectification import describe_rows
from visionattn.predict.stereo import EXCHANGED, StereoMatch, looks_exchanged, match_views, open_calibration
from visionattn.predict.videos.video import VIDEOS

__all__ = ["FORMATS", "PICTURE", "stereo_files"]

FORMATS = (".png", ".pfm", ".npy", ".npz")  # the first is the default in folders
PICTURE = "color"  # the format of colour images
PLACE = Path("disparity")  # default output


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
    fill: bool = False,
    calibration: str | Path | None = None,
    focal: float | None = None,
    fy: float | None = None,
    baseline: float | None = None,
    doffs: float = 0.0,
    ply: bool = False,
    principal_point: tuple[float, float] | None = None,
) -> Outcome:
    """Match stereo pairs in files, with one line of output per pair.

    Args:
        left: Image, video, folder (with its subfolders) or pattern.
        right: The same for the right view, with the same names if there are several.
        output: A file, whose suffix determines the format; or a folder. Default: a colour image, disparity.png, or
            several in the folder disparity.
        model: See `visionattn.stereo`.
        checkpoint: See `visionattn.stereo`.
        format: Format of the files in a folder: "png" (KITTI's, 16 bits), "pfm", "npy", "npz", or "color": colour
            images, also for a .png output. Default: "png" in a named folder.
        color: Also write NAME_color.png, a colour image.
        nonocc: Also write NAME_nonocc.png: white where a pixel is not occluded.
        right_disparity: Also write NAME_right, the disparities of the right view.
        overwrite: Replace existing outputs.
        skip_existing: Keep existing outputs, to resume an interrupted run.
        device: See `visionattn.stereo`.
        dtype: See `visionattn.stereo`.
        max_pixels: See `visionattn.stereo`.
        low_resolution_start: See `visionattn.stereo`.
        enlarge: See `visionattn.stereo`.
        fill: See `visionattn.stereo`.
        calibration: See `visionattn.stereo`: also write NAME_depth.
        focal: Focal length in pixels: also write NAME_depth.
        fy: Focal length along columns if it differs, for `ply`.
        baseline: Distance of the cameras in metres, with `focal`, or to override that of the file.
        doffs: See `visionattn.stereo`.
        ply: Also write NAME.ply: a point cloud of the non-occluded pixels, coloured.
        principal_point: Column and row in the left view, for `ply`. Default: its centre.

    Returns:
        The written, skipped and failed outputs; a failed pair does not end the run.

    Raises:
        VisionAttnError: The run could not start: an input, the model, the folder, a package or a calibration value is
            missing.
    """
    if fill:
        require("cv2", "images")
    cameras = open_calibration(
        calibration, focal, baseline, doffs=doffs, principal_point=principal_point, fy=fy, ply=ply
    )
    found, names = pairs.pair_up(left, right, output)
    as_picture = format == PICTURE or output is None
    if output is None:
        output = PLACE if found[1] else PLACE.with_suffix(_suffix_of(found[0][0][0]))
    if as_picture:
        format = "png" if found[1] or Path(output).suffix.lower() != ".png" else None
    work = _Work(as_picture, color and not as_picture, nonocc, right_disparity, fill, cameras, ply)
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
    """Suffix of the default output."""
    return source.suffix if source.suffix.lower() in VIDEOS else ".png"


@dataclass
class _Work:
    """Runs the jobs one after the other with a shared `matcher`, which is set once the jobs are known."""

    as_picture: bool
    color: bool
    nonocc: bool
    right_disparity: bool
    fill: bool
    cameras: Calibration | None
    ply: bool

    matcher: Matcher = field(init=False)

    def files_beside(self, target: Path) -> list[Path]:
        """Additional files written next to an output."""
        images = [pairs.image_beside(target, name) for name in ("color", "nonocc") if getattr(self, name)]
        right = [_beside(target, "right")] if self.right_disparity else []
        right += [pairs.image_beside(target, "right_color")] if right and self.color else []
        depth = [] if self.cameras is None else [_beside(target, "depth")]
        return images + right + depth + ([target.with_suffix(".ply")] if self.ply else [])

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, match and write, or raise an error. The output is written last: it marks the job as done."""
        with pairs.naming(job):
            return self._video(job, bar) if job.is_video else self._images(job)

    def _images(self, job: Job) -> list[str]:
        left, right = pairs.read_pair(job)
        found = match_views(self.matcher, left.pixels, right.pixels, self.cameras, self.fill)
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
        """Write disparities as a colour image, or as values, optionally with a colour image."""
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
        top: list[float] = []  # the same colour scale for all frames
        unknown: list[float] = []

        def show(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            if not top:
                notes.update(dict.fromkeys([EXCHANGED] if looks_exchanged(left, right) else describe_rows(left, right)))
            both = self.matcher(left, right)
            disparity = fill_left(both, left) if self.fill else both[0]
            notes.update(dict.fromkeys(self.matcher.notes))
            unknown.append(self.matcher.unknown)
            if not top:
                top.append(usual_top(disparity))
            return disparity_colours(disparity, top[0])

        pairs.convert_pair(job, bar, show)
        share = sum(unknown) / max(len(unknown), 1)
        return [*notes, *describe_unknown(share, self.fill), *self._left_out()]

    def _left_out(self) -> list[str]:
        given = {"nonocc": self.nonocc, "right": self.right_disparity, "focal": self.cameras, "ply": self.ply}
        asked = [f"--{name}" for name, value in given.items() if value]
        return [f"{', '.join(asked)}: for images only; a video shows the colours of disparity"] if asked else []


def _beside(target: Path, name: str) -> Path:
    """Path of additional values next to an output, in its format."""
    return target.with_stem(f"{target.stem}_{name}")
