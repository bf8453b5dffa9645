"""A baseline without a network: each image averaged to 16 x 16 pixels, with k-NN and a linear classifier.

A backbone that does not beat this baseline has learned little about these classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from visionattn.errors import DataError
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.heads.results import Score
from visionattn.probe.knn import NeighboursResult
from visionattn.probe.tokens.interface import Features, Layer, Tokens
from visionattn.probe.tokens.loading import read_batches

__all__ = ["SIDE", "PixelBaseline", "PixelComparison", "PixelFeatures", "PixelHead", "read_pixels"]

SIDE = 16


@dataclass(frozen=True)
class PixelHead:
    """A trained linear classifier of pixels: batch norm without scale and shift, then the classifier.

    Attributes:
        spec: Settings of its training.
        held_out_accuracy: Accuracy on the held-out training images after its best epoch.
        best_epoch: Epoch selected on the held-out images.
        parameters: Number of its parameters.
        score: Score on the test images.
    """

    spec: HeadSpec
    held_out_accuracy: float
    best_epoch: int
    parameters: int
    score: Score


@dataclass(frozen=True)
class PixelBaseline:
    """Results of the baseline.

    Attributes:
        neighbours: k-NN on the raw pixels, and with standardised channels.
        linear: Linear classifier with the highest held-out accuracy; None if all diverged.
    """

    neighbours: dict[bool, NeighboursResult]
    linear: PixelHead | None

    @property
    def best_neighbours(self) -> tuple[bool, NeighboursResult]:
        """The k-NN with the higher held-out accuracy, and whether its channels were standardised."""
        return max(self.neighbours.items(), key=lambda item: item[1].chosen.held_out_accuracy)


class PixelComparison(NamedTuple):
    """Pixels compared with the backbone, with the same method and test images.

    Attributes:
        method: `"k-NN"` or `"linear"`.
        pixels: Accuracy of the pixels.
        name: Name of the backbone's best k-NN or head by held-out accuracy.
        backbone: Its accuracy.
        p: P value of McNemar's exact test.
    """

    method: str
    pixels: float
    name: str
    backbone: float
    p: float

    @property
    def pixels_win(self) -> bool:
        """Whether the pixels have the higher accuracy."""
        return self.pixels > self.backbone

    def __str__(self) -> str:
        return (
            f"{self.method} {100 * self.pixels:.1f} % against {100 * self.backbone:.1f} % of {self.name} "
            f"(p = {self.p:.2g})"
        )


class PixelFeatures(Features):
    """Images as one token each, with pixels in [0, 1], held in memory.

    Args:
        pixels: Values of 0 to 255, uint8 (n, D).
        labels: Class of each image, int64 (n,).
        classes: Names of the classes.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, tuple(classes)
        self.layers = (Layer(f"{SIDE} x {SIDE} pixels", pixels.shape[1], (1, 1)),)

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`."""
        for some in rows.split(batch_size):
            yield some, [Tokens(self.pixels[some].unsqueeze(1) / 255)]


def read_pixels(
    dataset: Any,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PixelFeatures:
    """Read all images of a data set once, averaged to 16 x 16 pixels: 768 bytes per colour image.

    Args:
        dataset: Map-style data set of (normalised float image (C, size, size), int label), all of them readable.
        size: Side of the images.
        mean: Mean of their normalisation, which is undone.
        std: Standard deviation of their normalisation.
        classes: Names of the classes.
        num_workers: Loading processes.
        progress: Display of the progress bar.

    Raises:
        DataError: An image cannot be read.
    """
    rows = list(range(len(dataset)))
    cuts = [rows[first : first + 64] for first in range(0, len(rows), 64)]
    shift, scale = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    bar = progress.add_task("pixels", total=len(rows)) if progress is not None else None
    pixels, labels = [], []
    for batch in read_batches(dataset, (size, size), cuts, num_workers):
        if batch.images is None or batch.skipped:
            raise DataError(f"An image that was readable before cannot be read any more: {batch.skipped[0][1]}")
        small = F.interpolate(batch.images.float() * scale + shift, (SIDE, SIDE), mode="area")
        pixels.append((255 * small).round().clamp(0, 255).byte().flatten(1))
        labels += batch.labels
        if progress is not None and bar is not None:
            progress.advance(bar, len(batch.rows))
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return PixelFeatures(torch.cat(pixels), torch.tensor(labels), classes)
