"""Opening a model by name from timm's registry, from a weight file or folder, or as a module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from visionattn import models
from visionattn.adapters import adapt
from visionattn.adapters.torchvision import TORCHVISION, open_torchvision
from visionattn.adapters.transformers import is_of_transformers, open_transformers
from visionattn.checkpoints.creating import create, create_pretrained
from visionattn.checkpoints.loading import load
from visionattn.errors import CheckpointError, InputError, shorten
from visionattn.hub import HOSTED, published_config

__all__ = ["WEIGHT_FILES", "Opened", "has_weights", "is_file", "open_backbone", "open_model"]

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


class Opened(NamedTuple):
    """A model ready for inference.

    Attributes:
        model: On the CPU in evaluation mode; a given model is unchanged.
        source: Where its weights come from, for reports: "file best.ckpt", "NAME, URL", "random" or "as given".
        licence: Licence of the weights, or None if unknown.
    """

    model: nn.Module
    source: str
    licence: str | None


def open_model(
    model: str | Path | nn.Module | Opened | None,
    checkpoint: str | Path | None = None,
    random: bool = False,
    task: str | tuple[str | None, ...] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    drop_classifier: bool = False,
    **model_args: Any,
) -> Opened:
    """Open a model with its weights.

    An existing file or folder, or a name with the suffix of a weight file, is a file; everything else is a name:
    of timm's registry, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Args:
        model: Name, weight file or folder (see `visionattn.load`), or a module, also as `Opened`; None uses the model
            in `checkpoint`.
        checkpoint: Weight file for a name.
        random: Random weights for a name, always the same.
        task: Accepted tasks, such as "restore"; None among them accepts models without a
            task. Default: all.
        image_size: Side, or height and width, that a model of fixed image size is built for.
        drop_classifier: Build a name without its classifier, and ignore the one in `checkpoint`.
        **model_args: Further arguments of a name, such as `num_classes`.

    Raises:
        UnknownNameError: No model has that name; the nearest ones are suggested.
        CheckpointError: No weights are published, or they could not be read or do not fit.
        InputError: The model is of another task, or two sources of weights are given.
    """
    if isinstance(model, (nn.Module, Opened)):
        opened, name = model if isinstance(model, Opened) else Opened(model, "as given", None), None
        _refuse(type(opened.model).__name__, "is a model with its weights", checkpoint, random, model_args)
    else:
        if model is None:
            model, checkpoint = checkpoint, None
        if model is None:
            raise InputError("A model is required: its name, or a weight file.")
        name = os.fspath(model)
        opened = _open_named(name, checkpoint, random, task, image_size, drop_classifier, model_args)
    models.check_task(opened.model, task, name)
    return opened


def _open_named(
    name: str,
    checkpoint: str | Path | None,
    random: bool,
    task: str | tuple[str | None, ...] | None,
    image_size: int | tuple[int, int] | None,
    drop_classifier: bool,
    model_args: dict[str, Any],
) -> Opened:
    """Open a file or a name (arguments: see `open_model`)."""
    for given in (name, checkpoint and os.fspath(checkpoint)):
        if str(given).lower().endswith(".onnx"):
            raise CheckpointError(
                f"{shorten(given)} is an ONNX file: a weight file ({', '.join(WEIGHT_FILES)}) or the name of a model "
                "is required."
            )
    if is_file(name):
        _refuse(name, "is a file with weights", checkpoint, random, model_args)
        return Opened(load(Path(name)), f"file {Path(name).name}", None)
    if checkpoint is not None and random:
        raise InputError("Weights are random or from a file: leave out --random or --checkpoint.")
    config = published_config(name)
    if image_size and config is not None and config.fixed_input_size:
        model_args["img_size"] = image_size
    if checkpoint is not None:
        if drop_classifier:
            model_args["drop_classifier"] = True
        found = load(checkpoint, name, **model_args)
        return Opened(found, f"file {Path(checkpoint).name}", None)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Opened(create(name, **model_args).eval(), "random", None)
    found = create_pretrained(name, lambda outline: models.check_task(outline, task, name), **model_args)
    source = "as named" if config is None else config.hf_hub_id or config.url or Path(str(config.file)).name
    return Opened(found, f"{name}, {source}", config and config.license)


def open_backbone(
    model: str | Path | nn.Module | None,
    checkpoint: str | Path | None = None,
    random: bool = False,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> Opened:
    """Open a network as a token backbone: like `open_model` without a classifier, and networks of other libraries.

    Args:
        model: As in `open_model`; `torchvision/NAME`; a folder written by `save_pretrained` of transformers; or a
            module of torchvision or transformers. Nothing is downloaded for torchvision names.
        checkpoint: Weight file for a name, with or without a classifier.
        random: Random weights for a name.
        image_size: Side, or height and width, that a model of fixed image size is built for.

    Raises:
        CheckpointError: The weights could not be read or do not fit.
        InputError: The model is none of these, or returns no tokens.
        MissingPackageError: transformers is not installed.
        UnknownNameError: The model is unknown.
    """
    name = "" if model is None or isinstance(model, nn.Module) else os.fspath(model)
    if name.startswith(TORCHVISION):
        source = "random" if random else f"file {Path(str(checkpoint)).name}"
        return Opened(open_torchvision(name, checkpoint, random, image_size), source, None)
    if name and is_of_transformers(Path(name)):
        _refuse(name, "is a folder with weights", checkpoint, random, {})
        return Opened(open_transformers(Path(name)), f"folder {Path(name).name}", None)
    opened = open_model(model, checkpoint, random, image_size=image_size, drop_classifier=True)
    return opened._replace(model=adapt(opened.model))


def is_file(name: str | Path) -> bool:
    """Whether a name refers to a file or folder: it exists, or has the suffix of a weight file."""
    return os.path.exists(name) or Path(name).suffix.lower() in WEIGHT_FILES


def has_weights(name: str) -> bool:
    """Whether weights are published for a name.

    Raises:
        UnknownNameError: The tag is unknown.
    """
    config = published_config(name)
    return name.startswith(HOSTED) or bool(config and config.has_weights)


def _refuse(name: str, what: str, checkpoint: Any, random: bool, model_args: dict[str, Any]) -> None:
    options = [f"--{key.replace('_', '-')}" for key, value in model_args.items() if value is not None]
    options = ["--random"] * random + ["--checkpoint"] * (checkpoint is not None) + options
    if options:
        raise InputError(f"{shorten(name)} {what}: leave out {' and '.join(options)}.")
