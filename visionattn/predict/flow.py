"""Optical flow between two images: where each point of the first one lies in the second."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.predict.matching import Matcher

__all__ = ["estimate_flow", "flow_seen_in_both"]


def estimate_flow(
    first: np.ndarray,
    second: np.ndarray,
    model: nn.Module,
    *,
    precision: str = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
) -> np.ndarray:
    """Estimate the optical flow between two images, both ways.

    Args:
        first: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; grey or RGB, alpha is laid on white.
        second: Likewise, of the same size.
        model: Of the task "flow"; its device computes.
        precision: "fp32", "fp16", "bf16" or "auto" (fp16 on a GPU, else the weights' type).
        max_pixels: Larger images are reduced to this many pixels, and the result enlarged. Default: what half of the
            free memory holds.
        low_resolution_start: Start from what the model finds at half the size, as its authors do from 2K on.
        enlarge: Let the model see images so many times as high and wide, which makes its result finer.

    Returns:
        (4, H, W) of float32: x and y from the first image to the second, then from the second to the first, in pixels.

    Raises:
        InputError: Sizes, type or values of the images, the model or an argument are not accepted.
    """
    return Matcher(model, "flow", precision, max_pixels, low_resolution_start, enlarge)(first, second)


def flow_seen_in_both(flow: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Which pixels of the first image the second one shows too, by the consistency of both flows.

    Args:
        flow: (4, H, W), forward and backward.
        tolerance: Pixels by which the way there and back may miss the start.

    Returns:
        (H, W) of bool: False is occluded, out of the second image, or wrong.
    """
    height, width = flow.shape[1:]
    rows, columns = np.mgrid[:height, :width]
    x, y = columns + flow[0], rows + flow[1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    # grid_sample has -1 and 1 at the outer edges of the first and the last pixel.
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=-1).astype(np.float32)
    back = F.grid_sample(
        torch.from_numpy(np.ascontiguousarray(flow[None, 2:])), torch.from_numpy(grid)[None], align_corners=False
    )[0].numpy()
    return inside & (np.hypot(flow[0] + back[0], flow[1] + back[1]) <= tolerance)
