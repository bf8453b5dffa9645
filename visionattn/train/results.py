"""Predictions of a classifier on a split, image by image, and metrics computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from visionattn.data.samplers import IGNORED
from visionattn.probe.statistics import Interval, wilson_interval

__all__ = ["Judgements", "Results"]


class Judgements:
    """Collects the predictions on a split in the order of its images; a few numbers per image."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def clear(self) -> None:
        """Discard everything."""
        self._batches = []

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: (B, K).
            labels: int64 (B,); `IGNORED` for an image that could not be read.
        """
        confidences, predictions = probabilities.max(dim=1)
        own = probabilities.gather(1, labels.clamp(min=0)[:, None])
        better = (probabilities > own).sum(dim=1)
        self._batches.append(tuple(part.cpu() for part in (labels, predictions, confidences, own[:, 0], better)))

    def results(self, classes: Sequence[str]) -> Results | None:
        """The collected results; None if no image could be read."""
        if not self._batches:
            return None
        labels, predictions, confidences, own, better = (torch.cat(parts) for parts in zip(*self._batches))
        kept = (labels != IGNORED).nonzero()[:, 0]
        if not len(kept):
            return None
        return Results(
            tuple(classes), kept, labels[kept], predictions[kept], confidences[kept], own[kept], better[kept]
        )


@dataclass(frozen=True)
class Results:
    """Predictions of a classifier on a split.

    Attributes:
        classes: Names of the K classes.
        places: Index of each image in its split, int64 (n,).
        labels: Class of each image, int64 (n,).
        predictions: Most likely class of each image, int64 (n,).
        confidences: Probability of that class, (n,).
        own: Probability of the true class, (n,).
        better: Number of classes that are more likely than the true one, int64 (n,).
    """

    classes: tuple[str, ...]
    places: Tensor
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    own: Tensor
    better: Tensor

    def top(self, k: int) -> float:
        """Fraction of the images whose true class is among the k most likely."""
        return float((self.better < k).double().mean())

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose most likely class is correct."""
        return float((self.predictions == self.labels).double().mean())

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int((self.predictions == self.labels).sum()), len(self.labels))

    @property
    def confusion(self) -> Tensor:
        """Number of images per true class (rows) and predicted class (columns), int64 (K, K)."""
        return multiclass_confusion_matrix(self.predictions, self.labels, len(self.classes))

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        recalls = multiclass_recall(self.predictions, self.labels, len(self.classes), average=None)
        return float(recalls[self.labels.bincount(minlength=len(self.classes)) > 0].double().mean())

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: name, number of images, precision, recall and F1.

        Recall and F1 of a class without images are None.
        """
        measures = {
            name: function(self.predictions, self.labels, len(self.classes), average=None).tolist()
            for name, function in (
                ("precision", multiclass_precision),
                ("recall", multiclass_recall),
                ("f1", multiclass_f1_score),
            )
        }
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        return [
            {
                "class": name,
                "images": counts[label],
                **{
                    key: values[label] if counts[label] or key == "precision" else None
                    for key, values in measures.items()
                },
            }
            for label, name in enumerate(self.classes)
        ]

    def worst(self, count: int) -> list[int]:
        """Rows of the mistakes with the highest confidence, in descending order."""
        wrong = (self.predictions != self.labels).nonzero()[:, 0]
        order = self.confidences[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()

    def summary(self) -> dict[str, Any]:
        """Metrics of the whole split, as plain values."""
        low, high = self.interval
        found = {
            "images": len(self.labels),
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "balanced_accuracy": self.balanced_accuracy,
        }
        return {**found, **{f"top_{k}_accuracy": self.top(k) for k in (3, 5) if k < len(self.classes)}}
