"""Sweeps with a few training images per class, over several random subsets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from visionattn.errors import InputError
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.statistics import Interval, share_interval
from visionattn.probe.sweep import hold_out, sweep
from visionattn.probe.tokens.interface import Features

__all__ = ["FewShotResult", "few_shot", "few_shot_rows"]


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy of a pooling with a few training images.

    Attributes:
        pooling: Name of the pooling.
        layer: Name of the layer.
        size: Images per class (int), or fraction of each class (float).
        accuracies: Test accuracy of each draw, for the head and the epoch selected on the held-out images.
    """

    pooling: str
    layer: str
    size: float
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def interval(self) -> Interval:
        """95 % interval of the mean, within [0, 1]; NaN for fewer than 4 draws (see `share_interval`)."""
        return share_interval(self.accuracies)


def few_shot_rows(
    labels: torch.Tensor, per_class: int | None = None, fraction: float | None = None, draw_seed: int = 0
) -> torch.Tensor:
    """Draw a few training images of each class.

    Args:
        labels: Labels of all training images, (n,).
        per_class: Number of images of each class.
        fraction: Instead of `per_class`: fraction of each class, rounded, and at least one image.
        draw_seed: Seed of the draw.

    Returns:
        Rows of the images, sorted, int64.

    Raises:
        InputError: Neither or both of `per_class` and `fraction` are given, the value is out of range, or a class has
            too few images.
    """
    if (per_class is None) == (fraction is None):
        raise InputError("Exactly one of per_class and fraction must be given.")
    if (per_class is not None and per_class < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise InputError(
            f"per_class must be at least 1, or fraction above 0 and at most 1; got "
            f"{fraction if per_class is None else per_class}."
        )
    random, drawn = np.random.default_rng(draw_seed), []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1).numpy()
        count = per_class if fraction is None else max(1, math.floor(fraction * len(members) + 0.5))
        if count is None or count > len(members):
            raise InputError(f"Class {int(label)} has {len(members)} training images; {count} are required.")
        drawn.append(random.permutation(members)[:count])
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def few_shot(
    train: Features,
    test: Features,
    heads: Sequence[HeadSpec],
    sizes: Sequence[float],
    draws: int = 5,
    *,
    batch_size: int = 4096,
    state: Path | None = None,
    **options: Any,
) -> list[FewShotResult]:
    """Sweep over heads with a few training images, several times for each number of images.

    Args:
        train: Training images.
        test: Test images.
        heads: Heads to train.
        sizes: Images per class (int), or fractions of each class (float).
        draws: Number of independent draws of the images, with the seeds 0, 1, ...
        batch_size: Images per step; all images if there are fewer.
        state: Folder with one state file per draw.
        **options: Options of `sweep`.

    Returns:
        One result per size, pooling and layer, without draws in which all its heads diverged.

    Raises:
        InputError: See `sweep` and `few_shot_rows`.
    """
    found: dict[tuple[float, str, str], list[float]] = {}
    progress: Progress | None = options.get("progress")
    bar = progress.add_task("few-shot draws", total=len(sizes) * draws) if progress is not None else None
    for size in sizes:
        for draw in range(draws):
            amount = {"fraction": size} if isinstance(size, float) else {"per_class": int(size)}
            rows = few_shot_rows(train.labels, draw_seed=draw, **amount)  # type: ignore[arg-type]
            held = hold_out(train.labels, rows, options.get("holdout", 0.1), options.get("seed", 0))[1]
            file = None if state is None else Path(state) / f"{size}-{draw}.pt"
            size_of_batch = min(batch_size, len(rows) - len(held))
            result = sweep(train, test, heads, batch_size=size_of_batch, rows=rows, state=file, **options)
            for head in result.chosen:
                if head.best is not None:
                    found.setdefault((size, head.spec.pooling, head.layer), []).append(head.best.accuracy)
            if progress is not None and bar is not None:
                progress.advance(bar)
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return [FewShotResult(pooling, layer, size, values) for (size, pooling, layer), values in found.items()]
