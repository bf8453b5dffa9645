"""Matching on enlarged views: finer results at a higher cost."""

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
    """A stereo or flow network applied to views that are enlarged by a factor s.

        y(p) = network(up(first), up(second))(s p) / s        up: bicubic, clamped to 0..1

    The error of a small network is a fraction of a pixel of its finest map; on enlarged views such a pixel covers less
    of the image. The cost grows by s^2, and displacements become s times as large.

    Args:
        network: Network that maps two views (B, 3, H, W), RGB in 0..1, to (B, C, H, W) in pixels.
        factor: Factor s, from 1 to `LARGEST`.

    Shape:
        (B, 3, H, W) twice -> (B, C, H, W), in pixels of the original views.

    Raises:
        InputError: `factor` is below 1 or above `LARGEST`.
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
        if self.task == "stereo":  # 0 means invalid, so values interpolated from an invalid one are invalid too
            result = result.masked_fill(F.interpolate((found <= 0).to(found.dtype), size, mode="bilinear") > 0, 0)
        return result
