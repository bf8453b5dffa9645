"""Checks of the image batches that are passed to functions on frozen models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from visionattn.errors import InputError, shorten

__all__ = ["batches_of", "run_on"]


def batches_of(images: Any) -> list[Tensor]:
    """A list of batches (n, C, H, W), from one batch or an iterable of batches.

    Raises:
        InputError: There is no image, or something is not a batch of images.
    """
    batches = [images] if isinstance(images, Tensor) or not isinstance(images, Iterable) else list(images)
    if not batches or any(not isinstance(batch, Tensor) or batch.ndim != 4 or not len(batch) for batch in batches):
        raise InputError("images must be tensors (n, C, H, W) with at least one image.")
    return batches


def run_on(function: Callable[[Tensor], Tensor], batch: Tensor, model: nn.Module) -> Tensor:
    """Apply a function of a model to a batch.

    Raises:
        InputError: The model does not run on images of this size.
    """
    try:
        return function(batch)
    except (AssertionError, RuntimeError) as error:
        shape = " x ".join(map(str, batch.shape[1:]))
        raise InputError(f"{type(model).__name__} does not run on images of {shape}: {shorten(error)}") from error
