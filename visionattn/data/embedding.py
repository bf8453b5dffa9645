"""How retrieval shows images to a model, and what it takes as its answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2

from visionattn.data.transforms import fit

__all__ = ["conditions_of", "embed", "eval_transform", "finish", "input_config"]


def input_config(model: nn.Module, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What images a model expects, in plain types: size (height, width), mean, std and interpolation.

    Args:
        model: A model of timm's registry.
        size: Another size; None takes the model's.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    return {
        "size": list(size or config["input_size"][1:]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
    }


def eval_transform(config: dict[str, Any]) -> v2.Compose:
    """PIL image -> float (3, H, W), by a configuration of `input_config`.

    A square has the middle of the image, up to its shorter sides; another size has the whole image, stretched.
    """
    return v2.Compose(
        [
            partial(Image.Image.convert, mode="RGB"),
            *fit(tuple(config["size"]), v2.InterpolationMode(config["interpolation"])),
            *finish(config),
        ]
    )


def finish(config: dict[str, Any]) -> list[Any]:
    """Transforms from a PIL image of the right size to normalised floats."""
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]


def conditions_of(model: nn.Module) -> tuple[str, ...]:
    """The attributes that a model embeds by, in order; none for a model with one embedding for all."""
    return tuple(getattr(model, "attributes", ()))


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> L2-normalised float32 (B, C, E), one row for each condition of the model.

    A model without conditions gives its features, as timm's models do with `num_classes=0`: (B, 1, E).
    """
    features = model(images).float()
    if features.ndim == 2:
        features = features[:, None]
    return nn.functional.normalize(features, dim=-1)
