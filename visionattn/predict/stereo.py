"""Disparity of a rectified stereo pair, with its non-occluded pixels and depth.

A point at column x of the left view is at column x - d of the right one, in the same row. With a focal length of f
pixels and a baseline of b metres, its depth is f b / (d + o) metres, where o is the column of the right view's
principal point minus the left's (`doffs` in Middlebury's calib.txt, otherwise 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visionattn.errors import InputError, require
from visionattn.predict.calibration import Calibration, read_calibration
from visionattn.predict.consistency import seen_in_both
from visionattn.predict.filling import fill_inconsistent
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown, open_matcher, pixels_of
from visionattn.predict.rectification import describe_rows

__all__ = [
    "EXCHANGED",
    "StereoMatch",
    "check_calibration",
    "depth",
    "estimate_disparity",
    "looks_exchanged",
    "match_views",
    "open_calibration",
    "stereo",
]

EXCHANGED = "its matches lie to the right, so left and right seem to be swapped; if they are, the result is not usable"
ABSURD = 1e9  # upper bound of calibration values, in pixels or metres
# Detection of swapped views: width to which they are reduced, side of the compared windows, largest cost of a match
# relative to the median, smallest shift in reduced pixels that counts, and the minimum fractions of counted windows and
# of their signs.
WIDTH, WINDOW, MATCHING, SHIFT, ENOUGH, VERDICT = 192, 7, 0.5, 2, 0.05, 0.75


@dataclass(frozen=True, eq=False, repr=False)
class StereoMatch:
    """Result of stereo matching.

    Attributes:
        disparity: float32 (H, W): disparities of the left view in pixels, above 0; NaN where not known.
        right: float32 (H, W): disparities of the right view.
        nonocc: bool (H, W): the non-occluded pixels of the left view (see `seen_in_both`).
        depth: float32 (H, W) in metres, NaN where it is infinite; None without a calibration.
        notes: Notes for the user.
    """

    disparity: np.ndarray
    right: np.ndarray
    nonocc: np.ndarray
    depth: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        height, width = self.disparity.shape
        parts = [f"{height} x {width} pixels", f"disparity {_range(self.disparity)}"]
        parts += [f"{self.nonocc.mean():.1%} non-occluded"]
        parts += [] if self.depth is None else [f"depth {_range(self.depth)} m"]
        parts += [f"notes: {len(self.notes)}"] if self.notes else []
        return f"StereoMatch({', '.join(parts)})"


def _range(values: np.ndarray) -> str:
    if np.isnan(values).all():
        return "unknown"
    return f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}"


def stereo(
    left: np.ndarray | Tensor | Image.Image | str | Path,
    right: np.ndarray | Tensor | Image.Image | str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    calibration: str | Path | None = None,
    focal: float | None = None,
    baseline: float | None = None,
    doffs: float = 0.0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
    fill: bool = False,
) -> StereoMatch:
    """Match the views of a rectified stereo pair.

    Args:
        left: An array (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; a PIL image; a float tensor (C, H, W) in
            0..1; or the path of an image file (EXIF orientation is applied). Grey or RGB; alpha is composited on white.
        right: The same, with the same size.
        model: A model with the task "stereo": its name, a weight file, an exported .onnx or .ort file, or the module.
            Default: the shipped model.
        checkpoint: Weight file for a name.
        calibration: File of Middlebury, KITTI or OpenCV (see `visionattn.predict.calibration`), for `depth`.
        focal: Focal length in pixels, for `depth` without a file.
        baseline: Distance of the cameras in metres, with `focal`, or to override that of the file.
        doffs: Column of the right view's principal point minus the left's, in pixels.
        device: "auto" (a GPU if available; a module stays on its device), "cpu", "cuda:1".
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        max_pixels: Larger pairs are reduced to this many pixels, and the result enlarged. Default: as many as fit half
            of the free memory.
        low_resolution_start: Start from the result at half the size, as the authors do for images of 2K and more.
        enlarge: Factor by which images are enlarged for the model; the result becomes finer.
        fill: Replace the disparities of both views that fail the left-right consistency check, and smooth all along
            the edges of the views (see `visionattn.predict.filling.fill_inconsistent`; its tolerance is 0.5 pixels,
            that of `nonocc` 1). Needs OpenCV.

    Returns:
        Disparities, a mask of the non-occluded pixels, and depth if the cameras are known. A note tells if the rows of
        the views do not match, or left and right seem to be swapped.

    Raises:
        InputError: Sizes, type or values of the images, the model or an argument are not accepted.
        DataError: An image or calibration file does not exist, or is damaged.
        VisionAttnError: The model does not exist, or has no weights.
        MissingPackageError: `fill` is set, and OpenCV is not installed.
    """
    if fill:
        require("cv2", "images")
    cameras = open_calibration(calibration, focal, baseline, doffs=doffs)
    views = [pixels_of(image) for image in (left, right)]
    matcher = open_matcher(
        "stereo",
        model,
        checkpoint,
        device,
        dtype=dtype,
        max_pixels=max_pixels,
        low_resolution_start=low_resolution_start,
        enlarge=enlarge,
    )
    found = match_views(matcher, views[0][0], views[1][0], cameras, fill)
    found.notes[:0] = [note for _, notes in views for note in notes]
    return found


def match_views(
    matcher: Matcher, left: np.ndarray, right: np.ndarray, cameras: Calibration | None = None, fill: bool = False
) -> StereoMatch:
    """Match two views with an open network (arguments and errors: see `stereo`)."""
    own = None if cameras is None else cameras.at(*left.shape[:2])
    found = matcher(left, right)
    nonocc = seen_in_both(found)
    if fill:
        found = fill_inconsistent(found, left, right)
    notes = [EXCHANGED] if looks_exchanged(left, right) else describe_rows(left, right)
    notes += describe_unknown(matcher.unknown, fill)
    metres = None
    if own is not None:
        metres = depth(found[0], own.focal, own.baseline, own.doffs)
        behind = (np.isfinite(found[0]) & ~np.isfinite(metres)).mean()
        if behind:
            notes.append(f"{behind:.1%} have a disparity and no depth: disparity and --doffs together are not above 0")
        notes += own.notes
    return StereoMatch(found[0], found[1], nonocc, metres, notes + matcher.notes)


def open_calibration(
    calibration: str | Path | None,
    focal: float | None,
    baseline: float | None,
    *,
    doffs: float = 0.0,
    principal_point: tuple[float, float] | None = None,
    fy: float | None = None,
    **needing: object,
) -> Calibration | None:
    """The calibration of the cameras, from a file or from values (see `stereo`).

    Args:
        calibration: The file; of its values, only the baseline can be overridden.
        focal: Focal length in pixels.
        baseline: Distance of the cameras in metres.
        doffs: Column of the right view's principal point minus the left's, in pixels.
        principal_point: Column and row in the left view.
        fy: Focal length in pixels along columns.
        **needing: Arguments that require a calibration.

    Raises:
        DataError: The file does not exist, or is damaged.
        InputError: A value is missing or invalid.
    """
    numbers = {"focal": focal, "doffs": doffs, "principal_point": principal_point, "fy": fy}
    if calibration is None:
        check_calibration(focal, baseline, **needing, **dict(list(numbers.items())[1:]))
        if focal is None or baseline is None:
            return None
        if fy is not None:
            depth(np.ones((1, 1)), fy, baseline)
        return Calibration(focal, baseline, doffs, principal_point and (principal_point[0], principal_point[1]), fy)
    if given := [f"--{name.replace('_', '-')}" for name, value in numbers.items() if value]:
        raise InputError(f"The calibration file already gives {', '.join(given)}: leave that out.")
    found = read_calibration(calibration)
    if baseline is not None:
        found = replace(found, baseline=baseline, notes=())
    check_calibration(found.focal, found.baseline)
    return found


def check_calibration(focal: float | None, baseline: float | None, **needing: object) -> None:
    """Raise `InputError` for an incomplete or invalid calibration.

    Args:
        focal: Focal length in pixels.
        baseline: Distance of the cameras in metres.
        **needing: Arguments that require both.
    """
    if focal is not None and baseline is not None:
        depth(np.ones((1, 1)), focal, baseline)  # checks their values
        return
    if (focal is None) != (baseline is None):
        given, lacking = ("--focal", "--baseline") if baseline is None else ("--baseline", "--focal")
        raise InputError(
            f"{given} requires {lacking}: depth is focal length times baseline divided by disparity. Give both."
        )
    for name, value in needing.items():
        if value:
            raise InputError(f"--{name.replace('_', '-')} requires --focal and --baseline, or --calibration.")


def estimate_disparity(
    left: np.ndarray,
    right: np.ndarray,
    model: nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
    precision: str | None = None,
) -> np.ndarray:
    """Estimate the disparities of a rectified stereo pair.

    Args:
        left: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; grey or RGB; alpha is composited on white.
        right: The same, with the same size.
        model: A module with the task "stereo"; it runs on its own device.
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        max_pixels: Larger pairs are reduced to this many pixels, and the result enlarged. Default: as many as fit half
            of the free memory.
        low_resolution_start: Start from the result at half the size, as the authors do for images of 2K and more.
        enlarge: Factor by which images are enlarged for the model; the result becomes finer.
        precision: Old spelling of `dtype`: "fp32", "fp16" or "bf16".

    Returns:
        float32 (2, H, W): the disparities of the left and of the right view, in pixels, above 0. NaN where the network
        found a match at 0 or less: at an infinite distance or, for converging cameras, behind the point where their
        axes meet. The network searches in one direction only, and cannot tell how far behind.

    Raises:
        InputError: Sizes, type or values of the images, the model or an argument are not accepted.
    """
    return Matcher(model, "stereo", precision or dtype, max_pixels, low_resolution_start, enlarge)(left, right)


def depth(disparity: np.ndarray, focal: float, baseline: float, doffs: float = 0.0) -> np.ndarray:
    """Depth in metres.

    Args:
        disparity: (H, W) in pixels.
        focal: Focal length in pixels.
        baseline: Distance of the cameras in metres.
        doffs: Column of the right view's principal point minus the left's, in pixels.

    Returns:
        float32 (H, W); NaN where it is infinite.

    Raises:
        InputError: Focal length or baseline is not above 0, or a value is too large.
    """
    for name, value in (("focal length", focal), ("baseline", baseline)):
        if not 0 < value < ABSURD:
            raise InputError(f"The {name} must be above 0 and less than {ABSURD:g}; got {value}.")
    if not abs(doffs) < ABSURD:
        raise InputError(f"The difference of the principal points must be less than {ABSURD:g} pixels; got {doffs}.")
    total = disparity + doffs
    return np.where(total > 0, focal * baseline / np.where(total > 0, total, 1), np.nan).astype(np.float32)


def looks_exchanged(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether left and right views seem to be swapped: matches lie to the right instead of to the left.

    Windows of the reduced views are compared at all shifts up to a third of the width, in both directions, by the sum
    of absolute differences after subtraction of the local mean. The network cannot detect this: it searches in one
    direction only.

    Args:
        left: (H, W) or (H, W, C), as in `estimate_disparity`.
        right: The same, with the same size.
    """
    views = [_reduced_grey(as_tensor(pixels)) for pixels in (left, right)]
    width = views[0].shape[3]
    reach = width // 3
    costs = []
    for shift in range(-reach, reach + 1):
        moved = torch.roll(views[1], shift, 3)
        cost = F.avg_pool2d((views[0] - moved).abs(), WINDOW, 1, WINDOW // 2)
        columns = torch.arange(width) - shift
        cost[..., (columns < 0) | (columns >= width)] = torch.inf
        costs.append(cost[0, 0])
    volume = torch.stack(costs)  # (shifts, H, W)
    least, best = volume.min(0)
    usual = volume.median(0).values
    shifts = best - reach
    counted = (least < MATCHING * usual) & (shifts.abs() >= SHIFT)
    if counted.sum() < ENOUGH * counted.numel():
        return False
    return bool((shifts[counted] < 0).float().mean() > VERDICT)


def _reduced_grey(image: Tensor) -> Tensor:
    """(1, 3, H, W) -> (1, 1, h, w) with at most `WIDTH` columns, minus its local mean."""
    grey = image.mean(1, keepdim=True)
    ratio = min(1.0, WIDTH / grey.shape[3])
    size = max(1, round(grey.shape[2] * ratio)), max(1, round(grey.shape[3] * ratio))
    grey = F.interpolate(grey, size, mode="bilinear", antialias=True)
    return grey - F.avg_pool2d(grey, WINDOW, 1, WINDOW // 2, count_include_pad=False)
