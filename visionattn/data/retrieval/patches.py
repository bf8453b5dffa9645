"""Patches of images, as any backbone gives them, for comparing two images by parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.data.retrieval.embedding import conditions_of
from visionattn.errors import InputError, shorten

__all__ = ["SIDE", "read_patches"]

SIDE = 7  # most patches along a side of an image; more are averaged


@torch.no_grad()
def read_patches(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> the patches of a model's last map, float32 (B, N, D), averaged to at most 7 x 7.

    Args:
        model: A model of timm's registry, or one that embeds by attributes, of which the backbone is read.
        images: Prepared as the model asks, on its device.

    Raises:
        InputError: The model gives no map of patches.
    """
    net: Any = model.backbone if conditions_of(model) and hasattr(model, "backbone") else model
    try:
        maps = net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]
        height, width = maps.shape[2:]
    # What models without such maps raise for the question.
    except (AssertionError, AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(net).__name__} gives no map of patches (timm's forward_intermediates): {shorten(error)}. Images "
            "can be re-ranked only by a model that does."
        ) from error
    pooled = F.adaptive_avg_pool2d(maps.float(), (min(height, SIDE), min(width, SIDE)))
    return pooled.flatten(2).transpose(1, 2)
