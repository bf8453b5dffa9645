"""Image transforms of the classification data, from torchvision or an albumentations pipeline."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

from visionattn.data.albumentations_adapter import AlbumentationsTransform

__all__ = ["AUGMENTATIONS", "augment", "fit"]

AUGMENTATIONS = ("none", "shift", "crop-flip", "imagenet")


def fit(size: tuple[int, int], interpolation: v2.InterpolationMode, crop_pct: float = 1.0) -> list[Any]:
    """Transforms from an image of any size to the middle `crop_pct` of it, in `size`."""
    height, width = (round(side / crop_pct) for side in size)
    # A single number keeps the aspect of the image.
    return [v2.Resize(height if height == width else (height, width), interpolation), v2.CenterCrop(size)]


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
