"""A model for a command: a name whose weights are published, or a weight file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from visionattn.checkpoints import create
from visionattn.errors import CheckpointError, UnknownNameError

__all__ = ["WEIGHT_FILES", "pretrained"]

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


def pretrained(name: str, check: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """A model of the zoo with its weights.

    Args:
        name: Its name.
        check: Raises `InputError` for a model that does something else; None takes all.

    Raises:
        UnknownNameError: There is no such model.
        InputError: It does something else.
        CheckpointError: No weights are published for it.
    """
    try:
        config: Any = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownNameError(f"{error} Leave out the part after the dot for the default weights.") from error
    model = create(name, device="meta")  # which knows the names nearest to an unknown one
    if check is not None:
        check(model)
    if not config.has_weights:
        raise CheckpointError(f"No weights of {name} are there: give a weight file with --model FILE.")
    return create(name, pretrained=True).eval()
