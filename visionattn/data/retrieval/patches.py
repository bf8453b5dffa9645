"""Patch features of images from any backbone, for patch-wise comparison of two images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.data.retrieval.embedding import conditions_of
from visionattn.errors import InputError, shorten

__all__ = ["SIDE", "read_patches"]

SIDE = 7  # maximum number of patches along a side; more are averaged


@torch.no_grad()
def read_patches(model: nn.Module, images: Tensor) -> Tensor:
    """Compute the patches of a model's last feature map: images (B, 3, H, W) -> float32 (B, N, D), at most 7 x 7.

    Larger maps are averaged.

    Args:
        model: A model of timm's registry, or an attribute model, whose backbone is used.
        images: Images with the model's preprocessing, on its device.

    Raises:
        InputError: The model returns no map of patches.
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
