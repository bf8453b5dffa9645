"""Precision, recall and F1 of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["ClassScore", "class_scores"]


class ClassScore(NamedTuple):
    """Scores of one class on the test images.

    Attributes:
        name: Name of the class.
        precision: Share of the predictions of this class that are correct; 0 if it was never predicted.
        recall: Share of its images that were recognised.
        f1: Harmonic mean of precision and recall.
        support: Number of its images.
        taken_for: The class with which it is most often confused; None if all its images were recognised.
        times: Number of these confusions.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    taken_for: str | None
    times: int


def class_scores(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> list[ClassScore]:
    """Scores of each class that has images, in order of increasing F1; ties: the class with more images first.

    Args:
        predictions: Predicted class of each image, int64 (n,).
        labels: True class of each image, int64 (n,).
        classes: Names of the classes.
    """
    count = len(classes)
    support, taken = labels.bincount(minlength=count), predictions.bincount(minlength=count)
    right = labels[labels == predictions].bincount(minlength=count)
    wrong, times = (labels * count + predictions)[labels != predictions].unique(return_counts=True)
    mistaken: dict[int, tuple[int, int]] = {}  # class -> number of confusions, and the other class
    for pair, often in zip(wrong.tolist(), times.tolist()):
        label, other = divmod(pair, count)
        if often > mistaken.get(label, (0, 0))[0]:
            mistaken[label] = often, other
    found = []
    for label in support.nonzero().flatten().tolist():
        hits = int(right[label])
        often, other = mistaken.get(label, (0, 0))
        found.append(
            ClassScore(
                classes[label],
                hits / max(1, int(taken[label])),
                hits / int(support[label]),
                2 * hits / int(support[label] + taken[label]),
                int(support[label]),
                classes[other] if often else None,
                often,
            )
        )
    return sorted(found, key=lambda score: (score.f1, -score.support))
