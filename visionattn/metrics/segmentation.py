r"""Metrics of segmentation: intersection over union of classes and of their boundaries, and pixel accuracy.

All follow from pixel counts, which add up over images: for each class, the pixels assigned to it by both prediction and
ground truth, by the prediction, and by the ground truth. Ignored pixels are not counted.

    IoU_k = hits_k / (predicted_k + true_k - hits_k)      mIoU = mean of IoU_k over the classes k with a pixel in either

as torchmetrics' `MulticlassJaccardIndex` with macro average. Boundary IoU is the same over the pixels of a class that
are at most d pixels from a pixel of another class or from the image's border; d is 2 % of the image's diagonal, at
least 1.

Sources: PASCAL VOC, https://doi.org/10.1007/s11263-014-0733-5; Boundary IoU, arXiv 2103.16562.

Deviations, and why. The paper defines boundary IoU for the mask of one object; here, as for mIoU, counts are summed
over the images before the division. The distance is the larger of those along both axes, as in the authors' erosion
by squares. Ignored pixels belong to no class in the prediction either, so that a prediction that is correct elsewhere
scores 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BOUNDARY", "boundary", "count_boundary", "count_pixels", "iou", "mean_iou", "pixel_accuracy"]

BOUNDARY = 0.02
"""Width of boundaries as a fraction of the image's diagonal."""


def count_pixels(prediction: Tensor, truth: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Count the pixels of each class in an image.

    Args:
        prediction: Classes, integers (H, W).
        truth: Ground truth, integers (H, W).
        num_classes: K.
        ignore: Value of the ground truth at ignored pixels.

    Returns:
        int64 (3, K): hits, predicted, true.
    """
    return _count(prediction, truth, truth != ignore, truth != ignore, num_classes)


def count_boundary(
    prediction: Tensor, truth: Tensor, num_classes: int, ignore: int = 255, share: float = BOUNDARY
) -> Tensor:
    """Count the pixels of each class near its boundaries, like `count_pixels`.

    Args:
        prediction: Classes, integers (H, W).
        truth: Ground truth, integers (H, W).
        num_classes: K.
        ignore: Value of the ground truth at ignored pixels.
        share: Width d as a fraction of the diagonal.
    """
    height, width = truth.shape
    distance = max(1, round(share * (height**2 + width**2) ** 0.5))
    valid = truth != ignore
    prediction = torch.where(valid, prediction, ignore)
    return _count(
        prediction, truth, boundary(prediction, distance) & valid, boundary(truth, distance) & valid, num_classes
    )


def boundary(labels: Tensor, distance: int) -> Tensor:
    """Whether another class or the image's border is within a distance along both axes: (H, W) -> bool."""
    x = labels[None, None].float()
    pad = (distance,) * 4
    # Outside of the image, a value that no class has.
    x = F.pad(x, pad, value=-1.0)
    high, low = x, -x
    for kernel in ((2 * distance + 1, 1), (1, 2 * distance + 1)):
        high, low = F.max_pool2d(high, kernel, stride=1), F.max_pool2d(low, kernel, stride=1)
    return (high != -low)[0, 0]


def _count(prediction: Tensor, truth: Tensor, of_prediction: Tensor, of_truth: Tensor, num_classes: int) -> Tensor:
    hits = prediction[of_prediction & of_truth & (prediction == truth)]
    parts = (hits, prediction[of_prediction], truth[of_truth])
    return torch.stack([part.long().bincount(minlength=num_classes)[:num_classes] for part in parts])


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class: (..., 3, K) -> float64 (..., K), NaN for classes without a pixel."""
    hits, predicted, true = counts.double().unbind(-2)
    return hits / (predicted + true - hits)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean IoU over the classes that have a pixel: (..., 3, K) -> float64 (...)."""
    return iou(counts).nanmean(-1)


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Fraction of correctly classified pixels: (..., 3, K) -> float64 (...)."""
    hits, _, true = counts.double().unbind(-2)
    return hits.sum(-1) / true.sum(-1)
