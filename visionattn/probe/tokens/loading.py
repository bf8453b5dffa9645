"""Load images of a data set in batches; an image that cannot be read is reported and does not end the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.images import check_unreadable
from visionattn.data.samplers import ResumableLoader
from visionattn.errors import InputError

__all__ = ["ImageBatch", "ReadableImages", "check_share", "find_readable", "read_batches"]


class ImageBatch(NamedTuple):
    """The readable images of a batch."""

    rows: list[int]
    images: Tensor | None  # None if none could be read
    labels: list[int]
    skipped: list[tuple[int, str]]


class _Guarded(Dataset):
    """A data set that returns the reason as text if an image cannot be read."""

    def __init__(self, dataset: Any, size: tuple[int, int] | None) -> None:
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, int, str]:
        try:
            image, label = self.dataset[row]
        except Exception as error:  # readers can raise any error for a damaged file
            return row, None, -1, str(error) or type(error).__name__
        if self.size is None:
            return row, None, int(label), ""
        if not isinstance(image, Tensor) or tuple(image.shape[1:]) != self.size:
            given = f"{tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise InputError(
                f"The data set's images must be tensors (C, {self.size[0]}, {self.size[1]}) for this backbone; "
                f"image {row} is {given}."
            )
        return row, image, int(label), ""


def _collate(samples: list[tuple[int, Tensor | None, int, str]]) -> ImageBatch:
    images = [image for _, image, _, _ in samples if image is not None]
    good = [(row, label) for row, _, label, wrong in samples if not wrong]
    skipped = [(row, wrong) for row, _, _, wrong in samples if wrong]
    return ImageBatch(
        [row for row, _ in good], torch.stack(images) if images else None, [label for _, label in good], skipped
    )


def read_batches(
    dataset: Any, size: tuple[int, int] | None, batches: list[list[int]], num_workers: int
) -> Iterator[ImageBatch]:
    """Load batches of rows in order; without a size, images are opened but only labels are returned."""
    loader = ResumableLoader(
        _Guarded(dataset, size),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=size is not None and torch.cuda.is_available(),
        generator=torch.Generator(),  # do not use the global generator, which training uses
    )
    return iter(loader)


def check_share(skipped: Sequence[tuple[int, str]], images: int) -> None:
    """Check that enough images of a data set could be read.

    Raises:
        DataError: More than 10 % of its images, and more than a few, were skipped.
    """
    check_unreadable([f"image {row}: {reason}" for row, reason in skipped], images)


class ReadableImages(NamedTuple):
    """Images of a data set that can be read.

    Attributes:
        rows: Their indices in the data set, int64 (n,).
        labels: Their classes, int64 (n,).
        skipped: Index of each other image, and the reason.
    """

    rows: Tensor
    labels: Tensor
    skipped: list[tuple[int, str]]


def find_readable(dataset: Any, num_workers: int = 0, progress: Progress | None = None) -> ReadableImages:
    """Open every image once, since `LiveFeatures` does not accept unreadable images.

    `torch.utils.data.Subset(dataset, found.rows.tolist())` has the images that `extract` would store.

    Args:
        dataset: Map-style data set of (image, label).
        num_workers: Loading processes.
        progress: Display of the progress bar.

    Raises:
        DataError: More than 10 %, and more than a few, cannot be read.
    """
    rows, labels, skipped = [], [], []
    places = list(range(len(dataset)))
    batches = [places[i : i + 64] for i in range(0, len(places), 64)]
    bar = progress.add_task("images looked at", total=len(places)) if progress is not None else None
    for batch in read_batches(dataset, None, batches, num_workers):
        rows += batch.rows
        labels += batch.labels
        skipped += batch.skipped
        check_share(skipped, len(dataset))
        if progress is not None and bar is not None:
            progress.advance(bar, len(batch.rows) + len(batch.skipped))
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return ReadableImages(torch.tensor(rows), torch.tensor(labels), skipped)
