"""Bounds on a model by the weights of its file, which can declare anything, such as a depth of a million."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, shorten

__all__ = ["bounded"]


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
