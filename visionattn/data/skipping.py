"""Skipping unreadable samples: the next readable one replaces it in the batch, and the unreadable one is reported.

Batches keep their size, so that mixing, several ranks and exact resume work as usual. In training the replacement
counts as a sample; in evaluation it is marked as a copy, which losses and metrics skip. The replacement depends only
on the sample.

A dataset derives from `SkippingDataset`; its `dataset[key]` raises `DataError` for an unreadable sample. A
loader that reads batches (`ResumableLoader`) skips such samples and records them in `dataset.skipped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, default_collate

from visionattn.data.images import check_unreadable
from visionattn.errors import DataError, shorten

__all__ = ["SampleKey", "SkippingCollate", "SkippingDataset"]


class SampleKey(NamedTuple):
    """Index of a sample, epoch, and whether it is a copy that only equalises the ranks."""

    sample: int
    epoch: int
    is_copy: bool = False


def distinct(skipped: dict[int, str]) -> list[str]:
    """The reasons in the order of the samples, once for each image."""
    return list(dict.fromkeys(skipped[sample] for sample in sorted(skipped)))


class Samples(list[Any]):
    """The samples of a batch, and the samples that could not be read."""

    skipped: dict[int, str]


class SkippingDataset(Dataset):
    """Base of datasets whose unreadable samples are skipped when they are read in batches.

    Attributes:
        training: Whether the replacement of an unreadable sample counts.
        files: Number of images that the samples are made from; None for one image per sample.
        labels: Class of each sample, if there are classes.
        class_names: Names of the classes, if known.
    """

    training: bool = False
    files: int | None = None
    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def skipped(self) -> dict[int, str]:
        """Index of each unreadable sample so far, and the reason; filled in the process that iterates the loader."""
        return self.__dict__.setdefault("_skipped", {})

    def note(self, skipped: dict[int, str]) -> None:
        """Record the unreadable samples of a batch.

        Raises:
            DataError: There are too many by now, or a training class has no readable image.
        """
        if skipped.keys() <= self.skipped.keys():
            return
        self.skipped.update(skipped)
        check_unreadable(distinct(self.skipped), self.files or len(self))
        if self.training and self.labels is not None:
            sizes = Counter(self.labels)
            for label, count in Counter(self.labels[sample] for sample in self.skipped).items():
                if count == sizes[label]:
                    name = repr(self.class_names[label]) if self.class_names else label
                    first = next(why for sample, why in self.skipped.items() if self.labels[sample] == label)
                    raise DataError(f"No image of the class {name} can be read. The first: {first}")

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> Samples:
        """The samples of a batch."""
        found = Samples()
        found.skipped = {}
        for key in keys:
            found.append(self._readable(key if isinstance(key, SampleKey) else SampleKey(key, epoch=0), found.skipped))
        return found

    def _readable(self, key: SampleKey, skipped: dict[int, str]) -> Any:
        samples = len(self)
        files = self.files or samples
        stride = max(1, samples // files)  # samples of one image are adjacent
        for step in range(samples):
            sample = (key.sample + step * stride) % samples
            try:
                return self[key._replace(sample=sample, is_copy=key.is_copy or (step > 0 and not self.training))]
            except DataError as error:
                skipped[sample] = shorten(error, 300)
                check_unreadable(distinct(skipped), files)
        raise DataError(f"No image can be read. The first: {skipped[key.sample]}")


class SkippingCollate:
    """Collates samples, and passes on which others could not be read: (batch, skipped).

    Args:
        collate: Collates a list of samples to a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        inner = collate.collate if isinstance(collate, SkippingCollate) else collate
        self.collate: Callable[[list[Any]], Any] = inner or default_collate

    def __call__(self, samples: list[Any]) -> tuple[Any, dict[int, str]]:
        """Collate a batch."""
        return self.collate(samples), getattr(samples, "skipped", {})
