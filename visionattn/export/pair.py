"""A model of attribute retrieval as two files: a tower (image to tokens) and a head (tokens to embeddings)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn.export.check import frozen
from visionattn.export.part import Form, Part, whole

__all__ = ["pair_paths", "tower_and_head"]


def pair_paths(path: str | Path) -> tuple[Path, Path]:
    """The paths of tower and head for the common name `F.onnx`."""
    path = Path(path)
    return path.with_suffix(".tower.onnx"), path.with_suffix(".head.onnx")


class _Tower(nn.Module):
    """The part of a model that does not depend on the attribute, with the model's metadata about its input."""

    task = "retrieve"
    output_names = ("tokens",)
    num_classes = 0

    def __init__(self, model: Any, pair: str) -> None:
        super().__init__()
        self.model = model
        self.pair = pair
        for name in ("attributes", "pretrained_cfg", "_traits", "in_chans", "size_multiple", "size_minimum"):
            setattr(self, name, getattr(model, name))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.model.forward_tokens(images)


def tower_and_head(model: Any, path: str | Path, form: Form) -> tuple[Part, Part]:
    """The two files of an attribute-retrieval model.

    Raises:
        InputError: The model does not accept the size.
    """
    paths = pair_paths(path)
    model = frozen(model)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    images_to_tokens = _Tower(model, digest.hexdigest()[:16])
    tower = whole(images_to_tokens, paths[0], form)
    axes = ["batch", "tokens", "conditions"]
    if form.batch is not None:
        axes = ["tokens", "conditions"] if tower.spec.dynamic_size else ["conditions"]
    spec = replace(
        tower.spec,
        model=model.pretrained_cfg["architecture"],
        input_names=["tokens", "conditions"],
        output_names=["embeddings"],
        dynamic_axes=axes,
    )
    count = 7
    if "tokens" not in axes:
        count = model.forward_tokens(torch.zeros(1, *spec.input_size)).shape[1]
    inputs = torch.randn(form.batch or 2, count, model.num_features), torch.zeros(3, dtype=torch.long)
    return tower, Part(paths[1], model.head, spec, inputs, pair=model)
