"""Images that functions on frozen models are given in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from visionattn.errors import InputError, shorten

__all__ = ["batches_of", "run_on"]


def batches_of(images: Any) -> list[Tensor]:
    """A batch (n, C, H, W) as a list, or batches as they are.

    Raises:
        InputError: They are something else, or there are none.
    """
    batches = [images] if isinstance(images, Tensor) or not isinstance(images, Iterable) else list(images)
    if not batches or any(not isinstance(batch, Tensor) or batch.ndim != 4 or not len(batch) for batch in batches):
        raise InputError("images must be tensors (n, C, H, W) with one image at least.")
    return batches


def run_on(function: Callable[[Tensor], Tensor], batch: Tensor, model: nn.Module) -> Tensor:
    """Outputs of a model's function.

    Raises:
        InputError: It does not run on images of this size.
    """
    try:
        return function(batch)
    except (AssertionError, RuntimeError) as error:
        shape = " x ".join(map(str, batch.shape[1:]))
        raise InputError(f"{type(model).__name__} does not run on images of {shape}: {shorten(error)}") from error
