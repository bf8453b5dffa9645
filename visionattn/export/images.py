"""Random images and sizes with which exports are traced and checked, and the model's outputs for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import InputError
from visionattn.export.spec import ExportSpec, size_text

__all__ = ["check_sizes", "frozen", "outputs_of", "random_images", "scaled_size"]


def frozen(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode; the caller's model keeps its mode, dtype and device."""
    return copy.deepcopy(model).eval().to("cpu", torch.float32).requires_grad_(False)


def outputs_of(model: nn.Module, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run the model in PyTorch; a single output is returned as a sequence of one.

    Raises:
        InputError: The model itself does not accept these images.
    """
    try:
        with torch.no_grad():
            outputs = model(*images)
    # Each layer may reject a size with another type of exception.
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} itself fails in PyTorch at {size_text(*images[0].shape[2:])}: {error} "
            "If it takes only one size, export that size with --static-size (dynamic_size=False); if it takes "
            "multiples of a number, set its attribute `size_multiple`."
        ) from error
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def scaled_size(size: int, factor: float, spec: ExportSpec) -> int:
    """An accepted size near `factor * size`: a prime if any size is accepted, since no window or patch divides it."""
    size = max(round(factor * size), spec.size_minimum or 1, 2)
    if spec.size_multiple > 1:
        return spec.size_multiple * math.ceil(size / spec.size_multiple)
    while any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        size += 1
    return size


def check_sizes(spec: ExportSpec) -> list[tuple[int, int]]:
    """The sizes at which a file is checked: its own and, if it is dynamic, two very different ones.

    One is taller than wide and, if any size is accepted, not a multiple of any window; the other is the stated
    minimum, or wider than tall if none is stated.
    """
    height, width = spec.input_size[1:]
    if not spec.dynamic_size:
        return [(height, width)]
    tall = scaled_size(height, 1.6, spec), scaled_size(width, 0.6, spec)
    wide = scaled_size(height, 0.6, spec), scaled_size(width, 1.6, spec)
    minimum = spec.size_minimum or min(height, width)
    return [(height, width), tall, (minimum, minimum) if minimum < min(height, width) else wide]


def random_images(spec: ExportSpec, batch: int, size: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """One batch of images per input, in the input range, normalised as stated in the file's metadata.

    Like photographs, the images vary at all scales: each is the mean of noise on the pixel grid, on a grid half as
    fine, and so on. On white noise, the activations of a network trained on photographs may explode, so that outputs
    differ by rounding alone.

    Several inputs are views of one scene, each image shifted horizontally by a few pixels of its own. Without true
    matches, the comparison would depend on which of many wrong matches rounding prefers.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.input_range
    channels = spec.input_size[0]
    mean = torch.tensor(spec.mean or [0.0]).view(-1, 1, 1)
    std = torch.tensor(spec.std or [1.0]).view(-1, 1, 1)
    height, width = size
    reach = width // 8 if len(spec.input_names) > 1 else 0
    scene_size = height, width + reach
    octaves = [
        F.interpolate(torch.rand(batch, channels, *grid, generator=generator), scene_size, mode="bilinear")
        for grid in _halvings(scene_size)
    ]
    scenes = (torch.stack(octaves).mean(0) * (high - low) + low - mean) / std
    images = []
    for _ in spec.input_names:
        starts = torch.randint(reach + 1, (batch,), generator=generator).tolist()
        images.append(torch.stack([scene[..., x : x + width] for scene, x in zip(scenes, starts)]))
    return images


def _halvings(size: tuple[int, int]) -> list[tuple[int, int]]:
    """A size, half of it, and so on, while both sides have a pixel."""
    height, width = size
    return [(height >> level, width >> level) for level in range(min(size).bit_length())]
