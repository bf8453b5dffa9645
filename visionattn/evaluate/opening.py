"""Open the models of an evaluation: names, files and modules, each with a label for tables."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn.errors import ConfigError
from visionattn.models import check_task
from visionattn.opening import open_model

__all__ = ["DTYPES", "open_models", "place"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def open_models(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    task: str | tuple[str | None, ...],
) -> dict[str, Any]:
    """Open models, by unique label. Modules are copied, since their device, dtype and mode will change.

    Args:
        models: Names, weight files or modules.
        task: Accepted tasks.

    Raises:
        CheckpointError: A weight file is unreadable or fits no model, or no weights are available for a name.
        InputError: A model has another task.
        UnknownNameError: No model or file has that name.
    """
    networks: dict[str, Any] = {}
    for model in [models] if isinstance(models, (str, Path, nn.Module)) else models:
        label = _label(model, networks)
        networks[label] = _open(model, label, task)
    return networks


def place(networks: dict[str, Any], device: str, dtype: str) -> dict[str, Any]:
    """Move the networks to a device, in evaluation mode.

    Raises:
        ConfigError: The device or dtype does not exist.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype must be one of {', '.join(map(repr, DTYPES))}; got {dtype!r}.")
    try:
        return {label: network.eval().to(device, DTYPES[dtype]) for label, network in networks.items()}
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"The models cannot run on the device {device!r}: {error}") from error


def _label(model: str | Path | nn.Module, taken: dict[str, Any]) -> str:
    """A unique name for a model in tables."""
    if isinstance(model, nn.Module):
        config = getattr(model, "pretrained_cfg", None) or {}
        label = config.get("architecture") or type(model).__name__
    else:
        label = str(model)
    number = 1 + sum(other == label or other.startswith(f"{label} (") for other in taken)
    return label if number == 1 else f"{label} ({number})"


def _open(model: str | Path | nn.Module, label: str, task: str | tuple[str | None, ...]) -> nn.Module:
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model)
        check_task(model, task, label)
    return open_model(model, task=task).model
