"""A model from what a user names: a name of timm's registry, a weight file, a folder, or the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from visionattn import models
from visionattn.checkpoints import HOSTED, create, create_pretrained, load, load_weights, read_card
from visionattn.errors import CheckpointError, InputError, UnknownNameError, shorten

__all__ = ["WEIGHT_FILES", "Opened", "has_weights", "is_file", "open_model"]

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


class Opened(NamedTuple):
    """A model ready for inference.

    Attributes:
        model: On the CPU in evaluation mode; a model that was given stays as it is.
        source: Where its weights come from, for reports: "file best.ckpt", "NAME, URL", "random" or "as given".
        licence: Licence of the weights, or None where it is not known.
    """

    model: nn.Module
    source: str
    licence: str | None


def open_model(
    model: str | Path | nn.Module | None,
    checkpoint: str | Path | None = None,
    random: bool = False,
    task: str | tuple[str | None, ...] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    drop_classifier: bool = False,
    **model_args: Any,
) -> Opened:
    """Open a model with its weights.

    What exists as a file or folder, or ends like a weight file, is a file; all else is a name: of timm's registry,
    `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Args:
        model: Name, weight file or folder (see `visionattn.load`), or a module; None is what `checkpoint` says.
        checkpoint: Weight file for a name.
        random: Random weights for a name, always the same ones.
        task: Tasks of which the model must be one, such as "restore", where None among them accepts models that state
            none. Default: all.
        image_size: Side, or height and width, that a model of fixed image size is built for.
        drop_classifier: Build a name without its classifier, and ignore the one in `checkpoint`.
        **model_args: Further arguments of a name, such as `num_classes`.

    Raises:
        UnknownNameError: No model has that name; the nearest ones are suggested.
        CheckpointError: No weights are published, or they could not be read or do not fit.
        InputError: The model is of another task, or two sources of weights are given.
    """
    if isinstance(model, nn.Module):
        _refuse(type(model).__name__, "is a model with its weights", checkpoint, random, model_args)
        models.check_task(model, task)
        return Opened(model, "as given", None)
    if model is None:
        model, checkpoint = checkpoint, None
    if model is None:
        raise InputError("A model is required: its name, or a weight file.")
    name = os.fspath(model)
    for given in (name, checkpoint and os.fspath(checkpoint)):
        if str(given).lower().endswith(".onnx"):
            raise CheckpointError(
                f"{shorten(given)} is an ONNX file: a weight file ({', '.join(WEIGHT_FILES)}) or the name of a model "
                "is required."
            )
    if is_file(name):
        _refuse(name, "is a file with weights", checkpoint, random, model_args)
        opened = Opened(load(Path(name)), f"file {Path(name).name}", None)
        models.check_task(opened.model, task, name)
        return opened
    if checkpoint is not None and random:
        raise InputError("Weights are random or those of a file: leave out --random or --checkpoint.")
    config = _config(name)
    if image_size and config is not None and config.fixed_input_size:
        model_args["img_size"] = image_size
    if checkpoint is not None:
        found = _with_weights(name, checkpoint, drop_classifier, model_args)
        models.check_task(found, task, name)
        return Opened(found, f"file {Path(checkpoint).name}", None)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = create(name, **model_args).eval()
        models.check_task(found, task, name)
        return Opened(found, "random", None)
    found = create_pretrained(name, lambda outline: models.check_task(outline, task, name), **model_args)
    source = "as named" if config is None else config.hf_hub_id or config.url or Path(str(config.file)).name
    return Opened(found, f"{name}, {source}", config and config.license)


def is_file(name: str | Path) -> bool:
    """Whether a name is meant as a file or folder: it exists, or ends like a weight file."""
    return os.path.exists(name) or Path(name).suffix.lower() in WEIGHT_FILES


def has_weights(name: str) -> bool:
    """Whether weights are published for a name.

    Raises:
        UnknownNameError: The name has no such tag.
    """
    config = _config(name)
    return name.startswith(HOSTED) or bool(config and config.has_weights)


def _refuse(name: str, what: str, checkpoint: Any, random: bool, model_args: dict[str, Any]) -> None:
    options = [f"--{key.replace('_', '-')}" for key, value in model_args.items() if value is not None]
    options = ["--random"] * random + ["--checkpoint"] * (checkpoint is not None) + options
    if options:
        raise InputError(f"{shorten(name)} {what}: leave out {' and '.join(options)}.")


def _config(name: str) -> Any:
    """What timm knows of the weights of a name; None where a name is unknown, or is of weights itself."""
    if name.startswith(HOSTED):
        return None
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:
        hint = "Leave out the part after the dot for the default weights."
        raise UnknownNameError(f"{shorten(error)} {hint}") from error


def _with_weights(name: str, checkpoint: str | Path, drop_classifier: bool, model_args: dict[str, Any]) -> nn.Module:
    if not drop_classifier:
        return load(checkpoint, name, **model_args)
    # What the checkpoint says of its model holds; its classifier may be of other classes, or missing.
    card = read_card(checkpoint)
    if card is not None and card.name == name.split(".")[0]:
        model_args = {**card.model_args, **model_args}
    model = create(name, **{**model_args, "num_classes": 0})
    load_weights(model, checkpoint, drop_classifier=True)
    return model.eval()
