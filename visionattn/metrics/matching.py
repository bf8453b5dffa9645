"""Errors of disparities and flows as Middlebury, ETH3D, KITTI and Sintel report them.

Let d be the disparity, t its ground truth and e = |d - t|, in pixels of the original images; for flow, e is the length
of the difference and t the length of the ground truth. Over the pixels with ground truth:

    EPE     mean of e
    bad-x   percentage of e > x, for x = 0.5, 1, 2, 4
    D1      percentage of e > 3 and e > 0.05 t       (for flow, KITTI calls it Fl)

A pixel without a predicted disparity counts as bad and is excluded from EPE; `density` is the percentage of pixels with
a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionattn.errors import InputError

__all__ = ["Errors", "disparity_errors", "flow_errors"]


@dataclass(frozen=True)
class Errors:
    """Errors of one disparity or flow: EPE in pixels, all others in percent of the pixels with ground truth."""

    epe: float
    bad_0_5: float
    bad_1: float
    bad_2: float
    bad_4: float
    d1: float
    density: float


def disparity_errors(disparity: np.ndarray, truth: np.ndarray, region: np.ndarray | None = None) -> Errors:
    """Errors of a disparity map (equations: see the module).

    Args:
        disparity: (H, W) in pixels, NaN where there is none.
        truth: Ground truth, (H, W) in pixels, NaN where it is not known.
        region: bool (H, W), the pixels to evaluate. Default: all.

    Raises:
        InputError: The shapes differ, or no pixel has ground truth.
    """
    if disparity.shape != truth.shape:
        raise InputError(f"The disparity has the shape {disparity.shape}, but its ground truth {truth.shape}.")
    return flow_errors(disparity[..., None], truth[..., None], region)


def flow_errors(flow: np.ndarray, truth: np.ndarray, region: np.ndarray | None = None) -> Errors:
    """Errors of a flow field (equations: see the module).

    Args:
        flow: (H, W, 2) in pixels, NaN where there is none.
        truth: Ground truth, (H, W, 2) in pixels, NaN where it is not known.
        region: bool (H, W), the pixels to evaluate. Default: all.

    Raises:
        InputError: The shapes differ, or no pixel has ground truth.
    """
    if flow.shape != truth.shape:
        raise InputError(f"The flow has the shape {flow.shape}, but its ground truth {truth.shape}.")
    counted = np.isfinite(truth).all(-1)
    if region is not None:
        counted &= region
    if not counted.any():
        raise InputError("No pixel to evaluate has ground truth.")
    target = truth[counted].astype(np.float64)
    error = np.linalg.norm(flow[counted].astype(np.float64) - target, axis=-1)
    given = np.isfinite(error)
    error = np.where(given, error, np.inf)
    return Errors(
        epe=float(error[given].mean()) if given.any() else float("nan"),
        bad_0_5=_percent(error > 0.5),
        bad_1=_percent(error > 1),
        bad_2=_percent(error > 2),
        bad_4=_percent(error > 4),
        d1=_percent((error > 3) & (error > 0.05 * np.linalg.norm(target, axis=-1))),
        density=_percent(given),
    )


def _percent(pixels: np.ndarray) -> float:
    return 100 * float(pixels.mean())
