"""Preprocessing and embedding extraction for retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2

from visionattn.data.classify.transforms import Normalize, fit
from visionattn.errors import CheckpointError, InputError, shorten
from visionattn.models import check_task

__all__ = [
    "EMBEDDING_TASKS",
    "check_config",
    "check_embedding",
    "check_finite",
    "conditions_of",
    "embed",
    "eval_transform",
    "input_config",
]

LARGEST = 8192  # largest side of an input image, in pixels
EMBEDDING_TASKS = ("retrieve", "classify", None)  # None: timm's backbones have no task


def input_config(model: nn.Module, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Input configuration of a model, in plain types: size (height, width), mean, std and interpolation.

    They are taken from its `pretrained_cfg`, which `visionattn.load` reads from the checkpoint.

    Args:
        model: A model from timm's registry.
        size: Another size; None uses the model's.

    Raises:
        InputError: The size is not two integers from 1 to 8192.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    return {
        "size": _checked_size(size or config["input_size"][1:]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
    }


def _checked_size(size: Sequence[int]) -> list[int]:
    if len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST for side in size):
        raise InputError(f"The image size must be height and width from 1 to {LARGEST}; got {shorten(list(size))}.")
    return list(size)


def check_config(config: dict[str, Any]) -> None:
    """Refuse a configuration that does not come from `input_config`, such as that of a damaged file.

    Raises:
        InputError: An entry is missing or invalid.
    """
    try:
        _checked_size(config["size"])
        v2.InterpolationMode(config["interpolation"])
        numbers = [*config["mean"], *config["std"]]
        fits = len(config["mean"]) == len(config["std"]) == 3 and all(map(math.isfinite, numbers))
        if not fits or not all(config["std"]):
            raise ValueError("mean and std must be three finite numbers each")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"Images cannot be prepared by {shorten(config)}: {shorten(error)}.") from error


@torch.inference_mode()
def check_embedding(model: nn.Module, name: str, config: dict[str, Any]) -> None:
    """Refuse a model that does not return finite embeddings for its input size, by one forward pass.

    Args:
        model: The model, in evaluation mode.
        name: Its name in messages.
        config: Configuration from `input_config`.

    Raises:
        InputError: It has another task, does not accept the size, or returns something else.
        CheckpointError: Its weights are not finite.
    """
    check_task(model, EMBEDDING_TASKS, name)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"The weights of {shorten(name)} are damaged: {shorten(key)} is not finite in {dtype}."
            )
    height, width = config["size"]
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    try:
        found = model(image)
    # Errors that layers raise for an unsupported size or number of images.
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{shorten(name)} cannot embed an image of {height} x {width} pixels: {shorten(error)}. Choose a size "
            "that the model accepts."
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    expected = (1, len(conditions_of(model))) if conditions_of(model) else (1,)
    if len(shape) != len(expected) + 1 or shape[:-1] != expected:
        raise InputError(
            f"{shorten(name)} cannot be used here: for one image it returns {shape or type(found).__name__}, not "
            "embeddings (1, E), or (1, C, E) for C attributes."
        )


def eval_transform(config: dict[str, Any]) -> v2.Compose:
    """PIL image -> float (3, H, W), for a configuration from `input_config`.

    A square size crops the middle of the image, up to its shorter sides; another size uses the whole image, stretched.
    """
    return v2.Compose(
        [
            partial(Image.Image.convert, mode="RGB"),
            *fit(tuple(config["size"]), v2.InterpolationMode(config["interpolation"])),
            Normalize(config["mean"], config["std"]),
        ]
    )


def conditions_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that a model embeds by, in order; empty for a model with one embedding for all."""
    return tuple(getattr(model, "attributes", ()))


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> L2-normalised float32 (B, C, E), one row for each condition of the model.

    A model without conditions returns its features, as timm's models do with `num_classes=0`: (B, 1, E).
    """
    features = model(images).float()
    if features.ndim == 2:
        features = features[:, None]
    return nn.functional.normalize(features, dim=-1)


def check_finite(embeddings: Tensor, names: Sequence[str], model_name: str) -> None:
    """Refuse embeddings (B, C, E) that are not finite, since they cannot be ranked.

    Args:
        embeddings: Embeddings of images.
        names: Names of the images.
        model_name: Name of the model in messages.

    Raises:
        InputError: Some are not finite; the first is named.
    """
    good = embeddings.isfinite().flatten(1).all(dim=1)
    if not good.all():
        first = names[int((~good).int().argmax())]
        raise InputError(f"{shorten(model_name)} returns an embedding of {shorten(first)} that is not finite.")
