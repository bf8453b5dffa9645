"""Sweeps over a few training images of each class, drawn several times."""

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
        pooling: Its name.
        layer: Name of the layer.
        size: Images per class, or the fraction of each class where it is a float.
        accuracies: On the test images, one of each draw: of the head and the epoch that the held-out images chose.
    """

    pooling: str
    layer: str
    size: float
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Over the draws."""
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
        labels: Of all training images, (n,).
        per_class: Images of each class, or
        fraction: share of each class, rounded, and at least one image.
        draw_seed: Of the draw.

    Returns:
        Rows, sorted, int64.

    Raises:
        InputError: Not one of the two is given, it is out of range, or a class has fewer images.
    """
    if (per_class is None) == (fraction is None):
        raise InputError("Few-shot images are so many a class or a fraction of each: give one of the two.")
    if (per_class is not None and per_class < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise InputError(
            f"Few-shot images are 1 or more a class, or a fraction above 0 and up to 1, but got "
            f"{fraction if per_class is None else per_class}."
        )
    random, drawn = np.random.default_rng(draw_seed), []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1).numpy()
        count = per_class if fraction is None else max(1, math.floor(fraction * len(members) + 0.5))
        if count is None or count > len(members):
            raise InputError(
                f"Class {int(label)} has {len(members)} training images, fewer than the {count} asked for."
            )
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
    """Sweep over heads with a few training images, several times for each number of them.

    Args:
        train: Training images.
        test: Test images.
        heads: What to train.
        sizes: Images per class (int), or fractions of each class (float).
        draws: Of the images, independent, seeded 0, 1, ...
        batch_size: Images a step, or all that there are where these are less.
        state: Folder of a state file a draw.
        **options: Of `sweep`.

    Returns:
        Of each size and each pooling and layer. Draws in which all its heads diverged are left out.

    Raises:
        InputError: As in `sweep` and `few_shot_rows`.
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
