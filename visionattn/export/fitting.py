"""Fit pictures to the inputs of an exported file.

| task | picture | ground truth |
| --- | --- | --- |
| restore | bicubic downscaling of the centre, as in MATLAB | the centre itself |
| classify | resized and cropped as the model's evaluation does | as given |
| stereo | both views, resized to a size that the file takes | disparity, scaled with the width |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from visionattn.data.restore.bicubic import crop_to_multiple, downscale
from visionattn.export.spec import ExportSpec

__all__ = ["Example", "feeds", "fit_example", "match_example"]

_SIDE = 512  # of the centre crop of a high-resolution image
_STEREO_SIDE = 768  # to which larger views are resized


@dataclass(frozen=True, eq=False)
class Example:
    """One example.

    Attributes:
        images: One image per input, uint8 (H, W, C).
        truth: Ground truth: high-resolution image (r H, r W, C), class index, or disparity (H, W) with NaN where it is
            not known; None if there is none.
    """

    images: tuple[np.ndarray, ...]
    truth: Any = None


def feeds(spec: ExportSpec, example: Example) -> dict[str, np.ndarray]:
    """An example as the file's inputs: a batch of one, or of copies if the file has a fixed batch size."""
    result = {}
    for name, image in zip(spec.input_names, example.images):
        if spec.input_type != "uint8":
            low, high = spec.input_range
            values = image.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
            mean, std = (np.asarray(x, np.float32) for x in (spec.mean or [0.0], spec.std or [1.0]))
            image = np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
        result[name] = np.repeat(image[None], spec.batch or 1, axis=0)
    return result


def fit_example(spec: ExportSpec, pictures: Sequence[np.ndarray], truth: Any = None) -> Example:
    """Fit the pictures of one example.

    Args:
        spec: The file's metadata.
        pictures: uint8 (H, W) or (H, W, 3): a left and a right view for stereo, otherwise one.
        truth: Class index, or disparity of the left view (H, W) with NaN where it is not known; None if there is none.
    """
    if spec.task == "stereo":
        left, right = pictures
        return match_example(spec, left, right, truth)
    image = Image.fromarray(pictures[0]).convert("L" if spec.input_size[0] == 1 else "RGB")
    if spec.task != "restore":
        return _classified(spec, image, truth)
    return _restored(spec, image)


def _restored(spec: ExportSpec, image: Image.Image) -> Example:
    scale = spec.scale or 1
    if not spec.dynamic_size:
        height, width = (scale * side for side in spec.input_size[1:])
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = ImageOps.fit(image, (min(image.width, _SIDE), min(image.height, _SIDE)), centering=(0.5, 0.5))
    truth = crop_to_multiple(_array(image), scale)
    return Example((downscale(truth, scale),), truth)


def _classified(spec: ExportSpec, image: Image.Image, label: int | None) -> Example:
    height, width = spec.input_size[1:]
    method = getattr(Image.Resampling, (spec.interpolation or "bicubic").upper(), Image.Resampling.BICUBIC)
    bleed = (1 - (spec.crop_pct or 1.0)) / 2
    return Example((_array(ImageOps.fit(image, (width, height), method, bleed)),), label)


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def match_example(spec: ExportSpec, left: np.ndarray, right: np.ndarray, truth: np.ndarray | None) -> Example:
    """Resize a stereo pair to a size that a file takes; disparities are scaled with the width.

    Args:
        spec: The file's metadata.
        left: uint8 (H, W, 3).
        right: uint8 (H, W, 3).
        truth: Ground-truth disparity of the left view (H, W), NaN where it is not known, or None.
    """
    height, width = left.shape[:2]
    if spec.dynamic_size:
        ratio = min(1.0, _STEREO_SIDE / max(height, width))
        ratio = max(ratio, (spec.size_minimum or 1) / min(height, width))
        size = [round(side * ratio) // spec.size_multiple * spec.size_multiple for side in (height, width)]
    else:
        size = spec.input_size[1:]
    if size != [height, width]:
        views = [Image.fromarray(view).resize((size[1], size[0]), Image.Resampling.BICUBIC) for view in (left, right)]
        left, right = (np.asarray(view) for view in views)
    if truth is not None and truth.shape != left.shape[:2]:
        nearest = F.interpolate(torch.from_numpy(np.ascontiguousarray(truth))[None, None].float(), tuple(size))
        truth = nearest[0, 0].numpy() * (size[1] / width)
    return Example((np.ascontiguousarray(left), np.ascontiguousarray(right)), truth)
