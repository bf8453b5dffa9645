"""Optical flow between two images: the displacement of each point from the first image to the second."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visionattn.predict.matching import Matcher, open_matcher, pixels_of

__all__ = ["FlowMatch", "estimate_flow", "flow", "flow_seen_in_both", "match_images"]


@dataclass(frozen=True, eq=False, repr=False)
class FlowMatch:
    """Optical flow between two images.

    Attributes:
        flow: float32 (H, W, 2): x and y in pixels, from the first image to the second.
        backward: float32 (H, W, 2), from the second image to the first.
        nonocc: bool (H, W): the non-occluded pixels of the first image (see `flow_seen_in_both`).
        notes: Notes for the user.
    """

    flow: np.ndarray
    backward: np.ndarray
    nonocc: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        height, width, _ = self.flow.shape
        length = np.hypot(self.flow[..., 0], self.flow[..., 1])
        parts = [f"{height} x {width} pixels", f"lengths {length.min():.4g} to {length.max():.4g}"]
        parts += [f"{self.nonocc.mean():.1%} non-occluded"]
        parts += [f"notes: {len(self.notes)}"] if self.notes else []
        return f"FlowMatch({', '.join(parts)})"


def flow(
    first: np.ndarray | Tensor | Image.Image | str | Path,
    second: np.ndarray | Tensor | Image.Image | str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
) -> FlowMatch:
    """Estimate the optical flow between two images, forward and backward.

    Args:
        first: An array (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; a PIL image; a float tensor (C, H, W) in
            0..1; or the path of an image file (EXIF orientation is applied). Grey or RGB; alpha is composited on white.
        second: The same, with the same size.
        model: A model with the task "flow": its name, a weight file, or the module. Default: the shipped network.
        checkpoint: Weight file for a name.
        device: "auto" (a GPU if available; a module stays on its device), "cpu", "cuda:1".
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        max_pixels: Larger images are reduced to this many pixels, and the result enlarged. Default: as many as fit half
            of the free memory.
        low_resolution_start: Start from the result at half the size, as the authors do for images of 2K and more.
        enlarge: Factor by which images are enlarged for the model; the result becomes finer.

    Returns:
        The flow in both directions, and a mask of the non-occluded pixels.

    Raises:
        InputError: Sizes, type or values of the images, the model or an argument are not accepted.
        DataError: An image file does not exist, or is damaged.
        VisionAttnError: The model does not exist, or has no weights.
    """
    images = [pixels_of(image) for image in (first, second)]
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
    found = match_images(matcher, images[0][0], images[1][0])
    found.notes[:0] = [note for _, notes in images for note in notes]
    return found


def match_images(matcher: Matcher, first: np.ndarray, second: np.ndarray) -> FlowMatch:
    """Match two images with an open network (errors: see `flow`)."""
    found = matcher(first, second)
    forward, backward = (way.transpose(1, 2, 0) for way in (found[:2], found[2:]))
    return FlowMatch(forward, backward, flow_seen_in_both(found), matcher.notes)


def estimate_flow(
    first: np.ndarray,
    second: np.ndarray,
    model: nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    low_resolution_start: bool = False,
    enlarge: float = 1.0,
    precision: str | None = None,
) -> np.ndarray:
    """Estimate the optical flow between two images, forward and backward.

    Args:
        first: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; grey or RGB; alpha is composited on white.
        second: The same, with the same size.
        model: A module with the task "flow"; it runs on its own device.
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        max_pixels: Larger images are reduced to this many pixels, and the result enlarged. Default: as many as fit half
            of the free memory.
        low_resolution_start: Start from the result at half the size, as the authors do for images of 2K and more.
        enlarge: Factor by which images are enlarged for the model; the result becomes finer.
        precision: Old spelling of `dtype`: "fp32", "fp16" or "bf16".

    Returns:
        float32 (4, H, W): x and y from the first image to the second, then from the second to the first, in pixels.

    Raises:
        InputError: Sizes, type or values of the images, the model or an argument are not accepted.
    """
    return Matcher(model, "flow", precision or dtype, max_pixels, low_resolution_start, enlarge)(first, second)


def flow_seen_in_both(flow: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Find the non-occluded pixels of the first image by forward-backward consistency.

    Args:
        flow: (4, H, W), forward and backward.
        tolerance: Largest forward-backward error, in pixels.

    Returns:
        bool (H, W): False where a pixel is occluded, outside of the second image, or wrong.
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
