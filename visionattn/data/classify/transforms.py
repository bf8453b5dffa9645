"""Image transforms of the classification data, from torchvision or an albumentations pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from visionattn.data.classify.albumentations_adapter import AlbumentationsTransform

__all__ = ["AUGMENTATIONS", "Normalize", "augment", "fit", "middle"]

AUGMENTATIONS = ("none", "shift", "crop-flip", "imagenet")
ASPECT = 16  # largest aspect ratio of an image that is resized whole


class Normalize:
    """From a PIL image (L, RGB or RGBA) to float32 (C, H, W): (image / 255 - mean) / std.

    The values are those of torchvision's PILToTensor, ToDtype and Normalize, whose dispatch costs more than the
    arithmetic of a small image.

    Args:
        mean: Mean of each channel, of images in 0..1.
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert and normalise an image."""
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(pixels.astype(np.float32)).mul_(1 / 255).sub_(self.mean).div_(self.std)


def middle(image: Any) -> Any:
    """The middle of an image whose aspect ratio exceeds `ASPECT`; other images unchanged.

    Resizing the short side of such an image would make the long side huge, although the crop uses little of it.
    """
    height, width = v2.functional.get_size(image)
    longest = ASPECT * min(height, width)
    if max(height, width) <= longest:
        return image
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def fit(size: tuple[int, int], interpolation: v2.InterpolationMode, crop_pct: float = 1.0) -> list[Any]:
    """Transforms from an image of any size to a centre crop of `size`, `crop_pct` of its side."""
    height, width = (round(side / crop_pct) for side in size)
    if height != width:
        return [v2.Resize((height, width), interpolation), v2.CenterCrop(size)]
    # A single number keeps the aspect ratio.
    return [middle, v2.Resize(height, interpolation), v2.CenterCrop(size)]


def augment(augmentation: str, size: tuple[int, int], interpolation: v2.InterpolationMode) -> list[Any]:
    """Transforms from an image of any size to an augmented one of `size`."""
    whole = fit(size, interpolation)
    if augmentation == "none":
        return whole
    if augmentation == "shift":
        bilinear = v2.InterpolationMode.BILINEAR
        return [*whole, v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear)]
    if augmentation == "crop-flip":
        return [*whole, v2.RandomCrop(size, padding=min(size) // 8), v2.RandomHorizontalFlip()]
    if augmentation == "imagenet":
        return [
            v2.RandomResizedCrop(size, interpolation=interpolation),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
        ]
    return [AlbumentationsTransform(augmentation), *whole]
