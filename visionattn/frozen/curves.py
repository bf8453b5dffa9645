"""Accuracy of pruned models against their multiply-accumulates: pruned tokens, pruned heads, and the controls.

The controls are the token scores `grid` and `random`, the head score `random`, and dropped blocks: pruning has to beat
them at the same cost. Features are the class token, or the mean of the patches, after the last norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.cost import count_macs
from visionattn.frozen.heads import prune_heads
from visionattn.frozen.plan import features_of
from visionattn.frozen.selection import knn_correct
from visionattn.frozen.tokens import SCORES, prune_tokens
from visionattn.probe.statistics import wilson_interval

__all__ = ["drop_blocks", "image_features", "prune_curves"]

KEEP = (0.75, 0.5, 0.25)
FREE_HEAD_SCORES = ("usage", "norm", "random")  # scores that need no classifier
BATCH = 100
CALIBRATION = 64  # images used to score heads


def drop_blocks(model: Any, count: int) -> nn.Module:
    """Copy a transformer without some evenly spaced blocks; the first and the last block always stay.

    Args:
        model: A model with `blocks`.
        count: Number of blocks to drop, at most all but two.
    """
    model = copy.deepcopy(model)
    blocks = list(model.blocks)
    inner = len(blocks) - 2
    out = {1 + int((number + 0.5) * inner / count) for number in range(count)}
    model.blocks = nn.Sequential(*(block for number, block in enumerate(blocks) if number not in out))
    return model


@torch.no_grad()
def image_features(model: nn.Module, images: Tensor, source: str = "mean") -> Tensor:
    """One vector per image, (n, D): the `"class"` token, or the `"mean"` of the patches."""
    prefix: Any = getattr(model, "num_prefix_tokens", 0)
    found = []
    for batch in images.split(BATCH):
        tokens = features_of(model, batch)
        found.append((tokens[:, 0] if source == "class" else tokens[:, prefix:].mean(1)).float().cpu())
    return torch.cat(found)


def prune_curves(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    tokens: bool = True,
    heads: bool = True,
    keep: Sequence[float] = KEEP,
    at: int | None = None,
    scores: Sequence[str] = SCORES,
    source: str = "mean",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the whole model, and the model with fewer tokens, fewer heads and fewer blocks.

    Args:
        model: A transformer that `prune_tokens` and `prune_heads` accept; it is not changed.
        images: Normalised images, (n, C, H, W).
        labels: Class of each image, int64 (n,), for leave-one-out k-NN (k = 20, standardised channels, cosine); None:
            accuracy is not measured.
        tokens: Measure pruned tokens.
        heads: Measure pruned heads.
        keep: Shares of the tokens, or of the heads, that stay.
        at: Index of the first block with fewer tokens (see `prune_tokens`).
        scores: Scores by which tokens are chosen (see `prune_tokens`).
        source: Vector of an image: `"class"` or `"mean"` (see `image_features`).
        progress: Called with a line of text before each row.

    Returns:
        Rows with `method`, `score`, `keep`, `parameters`, `macs`, `error` (relative error of the vectors with respect
        to the whole model), `accuracy`, `accuracy_low`, `accuracy_high` (None without labels) and `correct`, bool (n,)
        or None, for paired tests.

    Raises:
        InputError: The model cannot be pruned.
    """
    tell = progress or (lambda line: None)
    whole = image_features(model, images, source)
    rows = []
    for method, score, share, smaller in _variants(model, images, tokens, heads, keep, at, scores):
        tell(f"{method} {score} {share:g}".strip())
        vectors = whole if smaller is model else image_features(smaller, images, source)
        error = float(((vectors - whole).norm(dim=1) / whole.norm(dim=1)).mean())
        row: dict[str, Any] = {"method": method, "score": score, "keep": share}
        row |= {"parameters": sum(p.numel() for p in smaller.parameters())}
        row |= {"macs": count_macs(smaller, tuple(images.shape[1:])), "error": error}
        row |= {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "correct": None}
        if labels is not None:
            correct = knn_correct(vectors, labels)
            interval = wilson_interval(int(correct.sum()), len(correct))
            row |= {"accuracy": float(correct.double().mean()), "correct": correct}
            row |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
        rows.append(row)
    return rows


def _variants(
    model: Any,
    images: Tensor,
    tokens: bool,
    heads: bool,
    keep: Sequence[float],
    at: int | None,
    scores: Sequence[str],
) -> Iterator[tuple[str, str, float, nn.Module]]:
    yield "whole", "", 1.0, model
    count = len(model.blocks)
    for dropped in sorted({max(1, round((1 - share) * count)) for share in keep}):
        if dropped <= count - 2:
            yield "blocks", "", 1 - dropped / count, drop_blocks(model, dropped)
    if tokens:
        has_class = getattr(model, "cls_token", None) is not None
        for score in scores:
            for share in keep if score != "class" or has_class else ():
                smaller = copy.deepcopy(model)
                prune_tokens(smaller, share, at, score)
                yield "tokens", score, share, smaller
    if heads:
        for score in FREE_HEAD_SCORES:
            for share in keep:
                smaller = copy.deepcopy(model)
                prune_heads(smaller, images[:CALIBRATION], share, score)
                yield "heads", score, share, smaller
