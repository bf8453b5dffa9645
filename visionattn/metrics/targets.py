r"""Metrics for predicted labels and values, over all images and over bootstrap samples of them.

The weight w_i is how often a sample contains image i; R samples are computed at once:

    average precision     sum over thresholds of (recall_j - recall_(j-1)) precision_j, equal scores share a threshold
    R^2                   1 - sum w (y - p)^2 / sum w (y - mean of y)^2
    MAE                   sum w |y - p| / sum w
    Spearman              Pearson's correlation of ranks, equal values share their mean rank

as torchmetrics' `multilabel_average_precision`, `r2_score` and `mean_absolute_error`, and scipy's `spearmanr`.
Undefined values (no image of a class, equal targets) are NaN.
"""

from __future__ import annotations

import numpy as np

__all__ = ["average_precision", "draws", "mean_absolute_error", "r2_score", "spearman"]


def draws(images: int, resamples: int = 1000) -> np.ndarray:
    """How often each of n images occurs in R bootstrap samples of n images, from a fixed seed: (R, n)."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamples).astype(float)


def average_precision(prediction: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of one class.

    Args:
        prediction: Scores, (n,).
        truth: Ground truth, 0 or 1, (n,).
        weights: (R, n).

    Returns:
        (R,).
    """
    order = np.argsort(-prediction, kind="stable")
    ends = _ends(prediction[order])
    weights, truth = weights[:, order], truth[order]
    hits = np.cumsum(weights * truth, axis=1)[:, ends]
    said = np.cumsum(weights, axis=1)[:, ends]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(said > 0, hits / said, 0.0)
        recall = hits / hits[:, -1:]
    return (np.diff(recall, axis=1, prepend=0) * precision).sum(axis=1)


def r2_score(prediction: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficient of determination: (n,), (n,), (R, n) -> (R,)."""
    total = weights.sum(1)
    mean = weights @ truth / total
    spread = (weights * (truth - mean[:, None]) ** 2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, 1 - weights @ (truth - prediction) ** 2 / spread, np.nan)


def mean_absolute_error(prediction: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean absolute error: (n,), (n,), (R, n) -> (R,)."""
    return weights @ np.abs(truth - prediction) / weights.sum(1)


def spearman(prediction: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation: (n,), (n,), (R, n) -> (R,)."""
    total = weights.sum(1, keepdims=True)
    x, y = (_ranks(values, weights) for values in (prediction, truth))
    x, y = (ranks - (weights * ranks).sum(1, keepdims=True) / total for ranks in (x, y))
    spread = (weights * x * x).sum(1) * (weights * y * y).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (weights * x * y).sum(1) / np.sqrt(spread), np.nan)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of the values in each sample, (R, n)."""
    order = np.argsort(values, kind="stable")
    ends = _ends(values[order])
    upto = np.cumsum(weights[:, order], axis=1)[:, ends]
    before = np.concatenate([np.zeros((len(weights), 1)), upto[:, :-1]], axis=1)
    group = np.searchsorted(ends, np.arange(len(values)))
    ranks = np.empty_like(weights)
    ranks[:, order] = ((before + upto + 1) / 2)[:, group]
    return ranks


def _ends(ordered: np.ndarray) -> np.ndarray:
    """Indices of the last of each run of equal values."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
