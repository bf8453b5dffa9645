"""Building the model of a weight file, after checking on the meta device that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from visionattn.checkpoints.bounds import bounded
from visionattn.checkpoints.creating import create
from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, ConfigError, shorten

__all__ = ["build"]


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
