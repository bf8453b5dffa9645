"""Colour images of disparity and flow."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.utils import flow_to_image

__all__ = ["disparity_colours", "flow_colours", "usual_top"]

# Coefficients of x^0 to x^5 for red, green and blue: the colour map Turbo by A. Mikhailov as polynomials by R. Du,
# copyright 2019 Google LLC, Apache-2.0 (turbo_colormap.glsl).
TURBO = np.array(
    [
        [0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943],
        [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604],
        [0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973],
    ],
    np.float32,
)
TOP = 99.5  # percentile shown as the largest value, so that outliers do not dominate the colours


def usual_top(disparity: np.ndarray) -> float:
    """The disparity to show as the largest of an image, or 1 if none is above 0."""
    valid = disparity[np.isfinite(disparity)]
    top = float(np.percentile(valid, TOP)) if valid.size else 0.0
    return top if top > 0 else 1.0


def disparity_colours(disparity: np.ndarray, top: float | None = None) -> np.ndarray:
    """Turbo's colours, from blue for 0 (far) to red for `top` (near); black where there is no value.

    Args:
        disparity: (H, W) in pixels.
        top: Value shown in red. Default: `usual_top`.

    Returns:
        uint8 (H, W, 3).
    """
    top = usual_top(disparity) if top is None else top
    valid = np.isfinite(disparity)
    x = (np.where(valid, disparity, 0) / np.float32(top)).clip(0, 1).astype(np.float32)
    colours = np.zeros((*x.shape, 3), np.float32)
    for coefficients in TURBO.T[::-1]:  # Horner's scheme
        colours = colours * x[..., None] + coefficients
    return np.where(valid[..., None], np.rint(255 * colours.clip(0, 1)), 0).astype(np.uint8)


def flow_colours(flow: np.ndarray) -> np.ndarray:
    """The colour wheel of Baker et al. (IJCV 2011): direction as hue, length as saturation, full for the longest.

    Args:
        flow: (H, W, 2), x first; black where it is NaN.

    Returns:
        uint8 (H, W, 3).
    """
    valid = np.isfinite(flow).all(axis=2, keepdims=True)
    field = torch.from_numpy(np.where(valid, flow, 0).astype(np.float32)).movedim(2, 0)
    return np.where(valid, flow_to_image(field).movedim(0, 2).numpy(), 0).astype(np.uint8)
