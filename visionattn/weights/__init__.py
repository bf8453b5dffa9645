"""Published checkpoint layouts and ours: pure functions on state dicts, one file a family; and the weights we ship.

This module holds what all families share: reading a file safely, and taking a state dict out of its wrappers.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from visionattn.errors import CheckpointError

__all__ = ["SHIPPED", "mismatches", "read", "unwrap"]

SHIPPED = Path(__file__).parent
"""Folder of the weights that lie in the package, NAME.safetensors, each with its card, NAME.md."""

WRAPPERS = ("state_dict", "model", "params_ema", "params")
PREFIXES = ("module.", "_orig_mod.", "net.")


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: safetensors, or a pickle of plain types and tensors (`weights_only`).

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds objects that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of tensors and plain types, and nothing else is loaded: {error}"
        ) from error
    # A damaged pickle can fail in any way that the unpickler's bookkeeping can.
    except Exception as error:
        raise CheckpointError(f"Could not read the checkpoint {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the state dict out of training wrappers, and training prefixes off its keys.

    Raises:
        CheckpointError: There are no tensors in it.
    """
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return unwrap(content[wrapper])
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return unwrap({key.removeprefix(prefix): value for key, value in state.items()})
    if not state:
        raise CheckpointError(f"The checkpoint holds no weights; its entries are {', '.join(map(str, content))[:200]}.")
    return state


def mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """In words, each weight that is missing, unknown or of another shape."""
    lines = [f"{key} is missing" for key in wanted if key not in found]
    lines += [f"{key} is unknown" for key in found if key not in wanted]
    lines += [
        f"{key} is {tuple(found[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    return lines
