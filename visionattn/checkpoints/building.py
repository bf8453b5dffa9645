"""Building the model of a weight file, within bounds: a file can declare anything, such as a depth of a million."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from visionattn.checkpoints.creating import create
from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, ConfigError, shorten

__all__ = ["bounded", "build"]


def build(file: WeightFile, name: str, args: dict[str, Any]) -> nn.Module:
    """Build the model of a weight file, with fresh weights.

    Raises:
        CheckpointError: The model would be far larger than the file, or its weights do not fit.
    """
    # No size can exceed the content of the file.
    if large := _number_above(2**16 + file.bytes, args):
        raise CheckpointError(f"{shorten(file.path)} does not fit {name}: its arguments hold the number {large:.4g}.")
    outline = _outline(file, name, args)
    if outline is not None:
        file.fit(outline.state_dict(), name)
    with bounded(file, name):
        return create(name, **args)


def _outline(file: WeightFile, name: str, args: dict[str, Any]) -> nn.Module | None:
    """The model without memory for its weights; None for a model that computes in its constructor."""
    try:
        with bounded(file, name), torch.device("meta"):
            return create(name, **args)
    except (ConfigError, CheckpointError) as error:
        if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
            raise
        return None


def _number_above(largest: int, value: Any) -> float | None:
    """A number among arguments that exceeds `largest`, or None."""
    if isinstance(value, (int, float)):
        return value if abs(value) > largest else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for part in parts if (found := _number_above(largest, part)) is not None), None)


@contextmanager
def bounded(file: WeightFile, name: str) -> Iterator[None]:
    """Abort building a model that grows far beyond the weights of its file.

    Raises:
        CheckpointError: It does.
    """
    # A form with branches is several times as large as the fused one.
    tensors, elements = 1000 + 16 * len(file.state), 2**24 + 16 * file.bytes
    modules = 20 * tensors
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal tensors, elements, modules
        if threading.get_ident() != thread:
            return
        if isinstance(value, Tensor):
            tensors, elements = tensors - 1, elements - value.numel()
        else:
            modules -= 1
        if min(tensors, elements, modules) < 0:
            raise CheckpointError(
                f"{shorten(file.path)} does not fit {name}: with the arguments given it is far larger than the file's "
                "weights."
            )

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
