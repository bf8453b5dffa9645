"""Fidelity on the luma channel Y, the standard for comparing super-resolution methods.

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255        R, G, B in 0..255
    PSNR = 10 log10(255^2 / mean (Y1 - Y2)^2)               after r pixels are cropped from each side, r the scale

The images are rounded to 8 bits; Y is not, and is float64. Source of Y: ITU-R BT.601, as in MATLAB's rgb2ycbcr.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from visionattn.errors import InputError

__all__ = ["STRIP", "cut_border", "luma", "psnr_y", "to_uint8"]

STRIP = 2**21
"""Number of pixels compared at a time."""


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Convert an image (3, H, W) in 0..1 to uint8 (H, W, 3), clipped and rounded half up.

    Raises:
        InputError: Some values are not finite.
    """
    levels = image.detach().cpu().double() * 255
    if not torch.isfinite(levels).all():
        raise InputError("The model's output contains values that are not finite.")
    return (levels.clamp(0, 255) + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()


def luma(image: np.ndarray) -> np.ndarray:
    """Convert uint8 RGB (H, W, 3) to Y, float64 (H, W) in 16..235."""
    return 16 + image @ (np.array([65.481, 128.553, 24.966]) / 255)


def cut_border(y: np.ndarray, border: int) -> np.ndarray:
    """Crop `border` pixels from each side of (H, W) or (H, W, C).

    Raises:
        InputError: Nothing would be left.
    """
    if min(y.shape[:2]) <= 2 * border:
        raise InputError(
            f"An image of {y.shape[0]} x {y.shape[1]} pixels has no pixels left without its border of {border}."
        )
    return y[border : y.shape[0] - border, border : y.shape[1] - border]


def psnr_y(first: np.ndarray, second: np.ndarray, border: int) -> float:
    """PSNR in dB of two uint8 RGB images (H, W, 3) on Y; infinite if they are equal.

    Raises:
        InputError: The sizes differ, or nothing is left without the border.
    """
    if first.shape != second.shape:
        raise InputError(f"The images must have the same shape; got {first.shape} and {second.shape}.")
    first, second = cut_border(first, border), cut_border(second, border)
    rows = max(STRIP // first.shape[1], 1)  # a whole image in float64 would take eight times its memory
    strips = (slice(top, top + rows) for top in range(0, first.shape[0], rows))
    error = sum(float(np.square(luma(first[strip]) - luma(second[strip])).sum()) for strip in strips)
    error /= first.shape[0] * first.shape[1]
    return 10 * math.log10(255**2 / error) if error else math.inf
