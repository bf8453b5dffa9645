"""How well each class is told from the others: precision, recall and F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["ClassScore", "class_scores"]


class ClassScore(NamedTuple):
    """A class of the test images.

    Attributes:
        name: Of the class.
        precision: Share of the images that were taken for it and are; 0 where none was.
        recall: Share of its images that were recognised.
        f1: Harmonic mean of the two.
        support: Its images.
        taken_for: The class that it is most often taken for; None where all its images were recognised.
        times: How often that happened.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    taken_for: str | None
    times: int


def class_scores(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> list[ClassScore]:
    """The scores of each class that has images, the lowest F1 first, of equals the one with more images.

    Args:
        predictions: Class of each image, int64 (n,).
        labels: Likewise, as it is.
        classes: Names.
    """
    count = len(classes)
    support, taken = labels.bincount(minlength=count), predictions.bincount(minlength=count)
    right = labels[labels == predictions].bincount(minlength=count)
    wrong, times = (labels * count + predictions)[labels != predictions].unique(return_counts=True)
    mistaken: dict[int, tuple[int, int]] = {}  # class -> how often, and for which other
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
