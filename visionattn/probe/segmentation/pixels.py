"""A baseline without a network: each token consists of the pixels of its patch, averaged to 4 x 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from visionattn.errors import DataError
from visionattn.probe.tokens.interface import Features, Layer, Tokens
from visionattn.probe.tokens.loading import read_batches

__all__ = ["PixelTokens", "read_pixel_tokens"]

SIDE = 4


class PixelTokens(Features):
    """Patches of images as tokens, held in memory in half precision.

    Args:
        patches: Pixels of the patches, (n, N, D).
        grid: Height and width of the patches.
        classes: Names of the classes.
    """

    def __init__(self, patches: Tensor, grid: tuple[int, int], classes: Sequence[str]) -> None:
        self.patches, self.classes = patches, tuple(classes)
        self.labels = torch.zeros(len(patches), dtype=torch.int64)
        self.layers = (Layer("pixels", patches.shape[2], grid),)

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`."""
        for some in rows.split(batch_size):
            yield some, [Tokens(self.patches[some].float())]


def read_pixel_tokens(
    dataset: Any,
    size: tuple[int, int],
    grid: tuple[int, int],
    classes: Sequence[str],
    num_workers: int = 0,
    progress: Progress | None = None,
) -> PixelTokens:
    """Read all images of a data set once: 96 bytes per patch in colour.

    Args:
        dataset: Data set of (normalised float image (C, H, W), int), all of them readable.
        size: H and W.
        grid: Height and width of the backbone's grid of patches.
        classes: Names of the classes.
        num_workers: Loading processes.
        progress: Display of the progress bar.

    Raises:
        DataError: An image cannot be read.
    """
    rows = list(range(len(dataset)))
    bar = progress.add_task("pixels", total=len(rows)) if progress is not None else None
    found = []
    for batch in read_batches(
        dataset, size, [rows[first : first + 64] for first in range(0, len(rows), 64)], num_workers
    ):
        if batch.images is None or batch.skipped:
            raise DataError(f"An image that was readable before cannot be read any more: {batch.skipped[0][1]}")
        small = F.interpolate(batch.images.float(), (SIDE * grid[0], SIDE * grid[1]), mode="area")
        found.append(F.unfold(small, SIDE, stride=SIDE).transpose(1, 2).half())  # (B, N, C 16)
        if progress is not None and bar is not None:
            progress.advance(bar, len(batch.rows))
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return PixelTokens(torch.cat(found), grid, classes)
