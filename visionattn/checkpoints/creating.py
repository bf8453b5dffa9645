"""Creating a model by its name, with random or published weights and one-line errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from visionattn import models
from visionattn.card import describe
from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, ConfigError, UnknownNameError, VisionAttnError, shorten
from visionattn.hub import HOSTED, published_config, quick_when_offline

__all__ = ["check_name", "create", "create_pretrained"]


def create(
    name: str, *, pretrained: bool = False, checkpoint_path: str | Path | None = None, **model_args: Any
) -> nn.Module:
    """`timm.create_model` with one-line errors.

    The model's `pretrained_cfg` has the size and the channels that it was built for.

    Args:
        name: Name in timm's registry, or `hf-hub:REPOSITORY` or `local-dir:FOLDER`.
        pretrained: Load the published weights.
        checkpoint_path: Load the weights of a file, which must fit.
        **model_args: Further arguments of the model.

    Raises:
        UnknownNameError: No model has that name; the nearest names are suggested.
        ConfigError: The model cannot be built with the arguments.
        CheckpointError: Its weights could not be downloaded or read, or do not fit.
    """
    if not isinstance(name, str) or not name.startswith(HOSTED):
        check_name(name)
    elif not name.partition(":")[2].strip():
        raise UnknownNameError(f"{name!r} names nothing: give {name}OWNER/NAME, or a folder for local-dir.")
    if checkpoint_path and not Path(checkpoint_path).is_file():
        raise CheckpointError(f"There is no file {shorten(checkpoint_path)}, which checkpoint_path names.")
    try:
        with quick_when_offline(name, pretrained):
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    except VisionAttnError:
        raise
    except Exception as error:
        # Constructors and servers raise all kinds of exceptions.
        raise _explained(name, pretrained, model_args, error) from error
    describe(model, {})
    if checkpoint_path and Path(checkpoint_path).suffix in (".npz", ".npy"):
        timm.models.load_checkpoint(model, str(checkpoint_path))
    elif checkpoint_path:
        WeightFile.read(checkpoint_path).load_into(model)
    return model


def check_name(name: Any) -> None:
    """Raise `UnknownNameError`, which suggests the nearest names, for a name that no model has."""
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        nearest = models.suggest(name[:100]) if isinstance(name, str) else []
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "`visionattn list` shows the names."
        raise UnknownNameError(f"There is no model {shorten(name)!r}. {hint}")


def _explained(name: str, pretrained: bool, model_args: Mapping[str, Any], error: Exception) -> Exception:
    """The error to raise for a failure to build a model."""
    first = shorten(str(error).strip().partition("\n")[0] or type(error).__name__, 300).rstrip(".")
    shown = shorten(name)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", first)
    if isinstance(error, TypeError) and unknown and unknown[1] in model_args:
        return ConfigError(f"The model {shown!r} does not take one of these arguments: {first}.")
    if name.startswith(HOSTED):
        return CheckpointError(f"The model {shown!r} could not be loaded: {first}.")
    if "pretrained tag" in first:
        return UnknownNameError(f"{first}. Leave out the part after the dot for the default weights.")
    if isinstance(error, OSError):
        return CheckpointError(f"The weights of {shown!r} could not be downloaded: {first}. Give a weight file.")
    if pretrained and isinstance(error, RuntimeError):
        reason = shorten(" ".join(line.strip() for line in str(error).splitlines()[:3]), 300).rstrip(".")
        return CheckpointError(f"The weights of {shown!r} could not be loaded: {reason}.")
    given = {key: value for key, value in model_args.items() if key not in ("device", "dtype")}
    if not given:
        return error
    arguments = ", ".join(f"{key}={shorten(repr(value), 40)}" for key, value in list(given.items())[:8])
    kind = "" if isinstance(error, (ValueError, AssertionError)) else f"{type(error).__name__}: "
    return ConfigError(f"The model {shown!r} cannot be built with {arguments}: {kind}{first}.")


def create_pretrained(name: str, check: Callable[[nn.Module], None] | None = None, **model_args: Any) -> nn.Module:
    """A model with its published weights, ready for inference.

    Args:
        name: Name in timm's registry, or `hf-hub:REPOSITORY` or `local-dir:FOLDER`.
        check: Raises an error for an unsuitable model; called before weights are downloaded, if possible.
        **model_args: Further arguments of the model.

    Raises:
        UnknownNameError: No model has that name.
        CheckpointError: No weights are published for it, or they could not be downloaded.
    """
    hosted = name.startswith(HOSTED)
    if not hosted:
        check_name(name)
        config = published_config(name)
        if check is not None:
            with torch.device("meta"):
                check(create(name, **model_args))
        if config is None or not config.has_weights:
            raise CheckpointError(
                f"No weights are published for {shorten(name)}: give a weight file, or --random where random "
                "weights will do."
            )
    model = create(name, pretrained=True, **model_args)
    if hosted and check is not None:
        check(model)
    return model.eval()
