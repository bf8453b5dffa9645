"""A model of attribute retrieval as two files: a tower (image to tokens) and a head (tokens to embeddings)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from visionattn.errors import ExportError
from visionattn.export.check import LEAST_SPREAD, CheckRow
from visionattn.export.images import check_sizes, frozen, outputs_of, random_images
from visionattn.export.part import Part, whole
from visionattn.export.runtime import OnnxModel

__all__ = ["check_retrieval", "pair_paths", "tower_and_head"]

# Largest accepted absolute error of an embedding, whose length is 1.
TOLERANCE = 1e-4
BATCHES = (1, 3, 4)


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


def tower_and_head(
    model: Any,
    path: str | Path,
    input_size: tuple[int, int] | None,
    dynamic_size: bool | None,
    opset: int,
    weights: str,
    license: str | None,
    batch: int | None,
) -> tuple[Part, Part]:
    """The two files of an attribute-retrieval model (arguments: see `export_retrieval`).

    Raises:
        InputError: The model does not accept the size.
    """
    paths = pair_paths(path)
    model = frozen(model)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    images_to_tokens = _Tower(model, digest.hexdigest()[:16])
    tower = whole(images_to_tokens, paths[0], input_size, dynamic_size, opset, weights, license, batch)
    axes = ["batch", "tokens", "conditions"]
    if batch is not None:
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
    inputs = torch.randn(batch or 2, count, model.num_features), torch.zeros(3, dtype=torch.long)
    return tower, Part(paths[1], model.head, spec, inputs, pair=model)


def check_retrieval(model: Any, tower: str | Path, head: str | Path) -> list[CheckRow]:
    """Compare a pair in ONNX Runtime with the model in PyTorch, from random images to embeddings.

    Args:
        model: The model that was exported. It is not changed.
        tower: One file.
        head: The other.

    Returns:
        One row per size (those of the tower's check), batch size (three, or the fixed one twice) and number of
        attributes (1, 3 and all; repeated if there are fewer); all have passed.

    Raises:
        ExportError: Some rows fail; the message lists them.
    """
    model, first, second = frozen(model), OnnxModel(tower), OnnxModel(head)
    count, rows = len(model.attributes), []
    counts = BATCHES if first.spec.batch is None else (first.spec.batch,) * 2
    for size in check_sizes(first.spec):
        batches = [random_images(first.spec, batch, size, seed)[0] for seed, batch in enumerate(counts)]
        every = [outputs_of(model, [images])[0] for images in batches]  # (B, C, E) each
        found = [first(images.numpy())[0] for images in batches]
        spread = (torch.cat(every) - every[0][:1]).abs().max().item()
        why = "" if spread >= LEAST_SPREAD else "the model's embeddings of two images are equal: load trained weights"
        for number in dict.fromkeys((1, 3, count)):
            ids = np.arange(count - number, count) % count
            for expected, tokens in zip(every, found):
                actual = second.compute({"tokens": tokens, "conditions": ids})[0]
                error = float(np.abs(actual - expected[:, torch.from_numpy(ids)].numpy()).max())
                name = f"embeddings, {number} of {count} attributes"
                errors = (float("inf") if why else error,)
                rows.append(CheckRow(name, len(tokens), *size, errors, spread, TOLERANCE, why))
    failed = [row for row in rows if not row.passed]
    if failed:
        raise ExportError(
            f"The outputs of tower and head differ from those of the model in {len(failed)} of {len(rows)} checks: "
            + "; ".join(map(str, failed))
            + "."
        )
    return rows
