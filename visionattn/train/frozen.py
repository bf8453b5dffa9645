"""Evaluating a backbone before training: k-NN and a linear classifier on the input vectors of its classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.data.samplers import IGNORED
from visionattn.errors import DataError
from visionattn.probe.heads.banks import Head, grid
from visionattn.probe.knn import Neighbours, nearest_neighbours
from visionattn.probe.statistics import Interval
from visionattn.probe.sweep import sweep
from visionattn.probe.tokens.interface import Features, Layer, Tokens

__all__ = ["FrozenBackbone", "Vectors", "judge_vectors", "read_vectors"]

EPOCHS, BATCH = 60, 256
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


class Vectors(Features):
    """One vector per image, held in memory.

    Args:
        vectors: (n, D).
        labels: Class of each image, int64 (n,).
        classes: Names of the classes.
    """

    def __init__(self, vectors: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        self.vectors, self.labels, self.classes = vectors, labels, tuple(classes)
        self.layers = (Layer("classifier input", vectors.shape[1], (1, 1)),)

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`."""
        for some in rows.split(batch_size):
            yield some, [Tokens(self.vectors[some].unsqueeze(1))]


@dataclass(frozen=True)
class FrozenBackbone:
    """Results on the validation images.

    Attributes:
        neighbours: k-NN, the better of cosine and standardised channels on held-out training images.
        linear: Accuracy of the linear classifier; NaN if it diverged.
        interval: Its 95 % interval.
        head: The linear classifier; None if it diverged.
        train_images: Number of training images that could be read.
        val_images: Number of validation images.
    """

    neighbours: Neighbours
    linear: float
    interval: Interval
    head: Head | None
    train_images: int
    val_images: int

    def __str__(self) -> str:
        low, high = (100 * end for end in self.neighbours.interval)
        linear = "diverged"
        if self.head is not None:
            linear = f"{100 * self.linear:.1f} % [{100 * self.interval.low:.1f}, {100 * self.interval.high:.1f}]"
        return (
            f"frozen backbone on the validation split ({self.train_images:,} training, {self.val_images:,} validation "
            f"images): k-NN {100 * self.neighbours.accuracy:.1f} % [{low:.1f}, {high:.1f}], "
            f"linear head {linear}"
        )

    @property
    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Weight (K, D) and bias (K,) of the linear classifier on unstandardised vectors; None if it diverged."""
        if self.head is None:
            return None
        norm, classifier = self.head.norm, self.head.classifier
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = classifier.weight.detach() / (norm.running_var + norm.eps).sqrt()
        return weight, classifier.bias.detach() - weight @ norm.running_mean


@torch.no_grad()
def read_vectors(net: nn.Module, loader: Any, classes: Sequence[str]) -> Vectors:
    """The input vector of the classifier of a timm model for each image, in evaluation mode.

    Args:
        net: On its device; its modes are restored.
        loader: Batches of images and labels, on the CPU.
        classes: Names of the classes.

    Raises:
        DataError: Vectors are NaN or infinite.
    """
    model: Any = net
    device = next(net.parameters()).device
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        read = [
            (model.forward_head(model.forward_features(images.to(device)), pre_logits=True).float().cpu(), labels)
            for images, labels in loader
        ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    vectors, labels = (torch.cat(parts) for parts in zip(*read))
    vectors, labels = vectors[labels != IGNORED], labels[labels != IGNORED]
    if not vectors.isfinite().all():
        raise DataError("The backbone returns NaN or infinite features: its weights are damaged.")
    return Vectors(vectors, labels, classes)


def judge_vectors(train: Vectors, val: Vectors, seed: int = 0) -> FrozenBackbone:
    """Evaluate a frozen backbone by its vectors: k-NN, and a linear classifier on standardised vectors.

    k, temperature, learning rate and epoch are chosen on held-out training images, never on the validation images.
    """
    found = [
        nearest_neighbours(train, val, source="mean", standardize=flag, seed=seed).chosen for flag in (False, True)
    ]
    heads = grid(["gap"], (-1,), ("adamw",), LEARNING_RATES, seeds=(seed,))
    size = max(1, min(BATCH, len(train) // 4))
    result = sweep(train, val, heads, epochs=EPOCHS, batch_size=size, warmup_epochs=2, seed=seed).chosen
    best = result[0] if result and result[0].best is not None else None
    score = best.best if best is not None else None
    return FrozenBackbone(
        max(found, key=lambda pair: pair.held_out_accuracy),
        score.accuracy if score is not None else math.nan,
        score.interval if score is not None else Interval(math.nan, math.nan),
        best.head if best is not None else None,
        len(train),
        len(val),
    )
