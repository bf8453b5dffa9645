"""A matching network on enlarged views: finer results at a higher cost."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import InputError

__all__ = ["LARGEST", "EnlargedViews"]

LARGEST = 64.0
"""Largest factor: 4096 times the pixels."""


class EnlargedViews(nn.Module):
    """A network of the task "stereo" or "flow" on views s times as high and wide.

        y(p) = network(up(first), up(second))(s p) / s        up: bicubic, within 0..1

    The error of a small network is a fraction of a pixel of its finest map; on enlarged views, such a pixel covers less
    of the image. The cost is s^2 times as high, and displacements that are s times as large must still be found.

    Args:
        network: Takes two views (B, 3, H, W), RGB in 0..1, and returns (B, C, H, W) in pixels.
        factor: s, from 1 to `LARGEST`.

    Shape:
        (B, 3, H, W) twice -> (B, C, H, W), in pixels of the original views.

    Raises:
        InputError: The factor is less than 1 or too large.
    """

    def __init__(self, network: Any, factor: float) -> None:
        super().__init__()
        if not 1 <= factor <= LARGEST:
            raise InputError(f"The factor of enlargement must be from 1 to {LARGEST:g}; got {factor}.")
        self.network = network
        self.factor = factor
        self.task = network.task
        self.size_minimum = math.ceil(getattr(network, "size_minimum", 1) / factor)
        self.train(network.training)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), (B, 3, H, W) -> (B, C, H, W)."""
        size = first.shape[2:]
        large = [round(side * self.factor) for side in size]
        views = (F.interpolate(view, large, mode="bicubic").clamp(0, 1) for view in (first, second))
        found = self.network(*views)
        result = F.interpolate(found, size, mode="bilinear") / self.factor
        if self.task == "stereo":  # 0 means no disparity, so interpolated values that include one have none either
            result = result.masked_fill(F.interpolate((found <= 0).to(found.dtype), size, mode="bilinear") > 0, 0)
        return result
