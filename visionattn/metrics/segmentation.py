r"""What segmentation is measured by: intersection over union of classes, of their boundaries, and pixel accuracy.

All follow from counts of pixels, which add up over images: for each class the pixels that prediction and ground truth
both give to it, those of the prediction, and those of the ground truth. Ignored pixels are counted nowhere.

    IoU_k = hits_k / (predicted_k + true_k - hits_k)      mIoU = mean of IoU_k over the classes k with a pixel in either

as torchmetrics' `MulticlassJaccardIndex` with macro average. Boundary IoU is the same of the pixels of a class that lie
at most d pixels from a pixel of another class or the image's border, d = 2 % of the image's diagonal, and at least 1.

Sources: PASCAL VOC, https://doi.org/10.1007/s11263-014-0733-5; Boundary IoU, arXiv 2103.16562.

Deviations, and why. Boundary IoU is defined there for the mask of one object; as mIoU, counts are added over the images
here before they are divided. The distance is the larger of both axes', as that of the authors' erosion by squares.
Ignored pixels are of no class in the prediction too, so that a prediction that is right elsewhere has 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BOUNDARY", "boundary", "count_boundary", "count_pixels", "iou", "mean_iou", "pixel_accuracy"]

BOUNDARY = 0.02
"""Width of boundaries as a share of the image's diagonal."""


def count_pixels(prediction: Tensor, truth: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Count the pixels of classes in an image.

    Args:
        prediction: Classes, integers (H, W).
        truth: Likewise.
        num_classes: K.
        ignore: Value of the ground truth at pixels that are left out.

    Returns:
        int64 (3, K): hits, predicted, true.
    """
    return _count(prediction, truth, truth != ignore, truth != ignore, num_classes)


def count_boundary(
    prediction: Tensor, truth: Tensor, num_classes: int, ignore: int = 255, share: float = BOUNDARY
) -> Tensor:
    """Count the pixels of classes near their boundaries, as `count_pixels`.

    Args:
        prediction: Classes, integers (H, W).
        truth: Likewise.
        num_classes: K.
        ignore: Value of the ground truth at pixels that are left out.
        share: Width d as a share of the diagonal.
    """
    height, width = truth.shape
    distance = max(1, round(share * (height**2 + width**2) ** 0.5))
    valid = truth != ignore
    prediction = torch.where(valid, prediction, ignore)
    return _count(
        prediction, truth, boundary(prediction, distance) & valid, boundary(truth, distance) & valid, num_classes
    )


def boundary(labels: Tensor, distance: int) -> Tensor:
    """Whether a pixel has another class, or the image's border, within a distance along both axes: (H, W) -> bool."""
    x = labels[None, None].float()
    pad = (distance,) * 4
    # A value that no class has stands beyond the border.
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
    """Mean over the classes that have a pixel: (..., 3, K) -> float64 (...)."""
    return iou(counts).nanmean(-1)


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Share of pixels whose class is right: (..., 3, K) -> float64 (...)."""
    hits, _, true = counts.double().unbind(-2)
    return hits.sum(-1) / true.sum(-1)
