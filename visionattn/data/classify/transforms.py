"""Image transforms of the classification data, from torchvision or an albumentations pipeline."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

from visionattn.data.classify.albumentations_adapter import AlbumentationsTransform

__all__ = ["AUGMENTATIONS", "augment", "fit", "middle"]

AUGMENTATIONS = ("none", "shift", "crop-flip", "imagenet")
ASPECT = 16  # largest aspect ratio of an image that is resized whole


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
