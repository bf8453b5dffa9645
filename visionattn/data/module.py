"""Base of the data modules: they describe their splits, and list the images that could not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from visionattn.data.skipping import SkippingDataset
from visionattn.errors import ConfigError, shorten
from visionattn.lightning_import import import_lightning

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    LightningDataModule = import_lightning("lightning.pytorch").LightningDataModule

__all__ = ["DataModule", "count_classes", "list_skipped"]

_SHOWN = 10
_LISTED = 10


def count_classes(labels: Iterable[int], names: Sequence[str] | None) -> str:
    """Number of images per class as text: `24 images in 2 classes (cat 20, dog 4)`; of many classes the extremes.

    Args:
        labels: Class of each image.
        names: Names of the classes; None shows indices.
    """
    counts = Counter(labels)
    every = range(len(names)) if names else sorted(counts)

    def name(label: int) -> str:
        return shorten(names[label], 30) if names and label < len(names) else str(label)

    total = f"{counts.total():,} images in {len(counts):,} classes"
    if len(every) <= _SHOWN:
        return f"{total} ({', '.join(f'{name(label)} {counts[label]:,}' for label in every)})"
    least = min(every, key=lambda label: counts[label])
    most = max(every, key=lambda label: counts[label])
    return f"{total} (from {counts[least]:,} of {name(least)} to {counts[most]:,} of {name(most)})"


class DataModule(LightningDataModule):
    """Base of this package's data modules."""

    hparams: Any

    def __init__(self) -> None:
        super().__init__()
        self._watched: list[SkippingDataset] = []

    @property
    def tests_on_validation(self) -> bool:
        """Whether there is no test split, so that testing uses the validation split."""
        return False

    def describe(self, split: str) -> str:
        """Content of a split, logged at the start of a run; `split` is train, val, test or predict."""
        raise NotImplementedError

    def left_out(self) -> list[str]:
        """Files in the data folders that are not used, with the reason, one line per folder."""
        return []

    def skipped(self) -> list[str]:
        """The reason for each image that could not be read so far."""
        return list(dict.fromkeys(why for dataset in self._watched for why in dataset.skipped.values()))

    def watch(self, dataset: Any) -> Any:
        """Keep a reference to a dataset, whose unreadable images `skipped` lists."""
        if not any(dataset is known for known in self._watched):
            self._watched.append(dataset)
        return dataset

    def check_counts(self, **least: int) -> None:
        """Refuse settings that are too small.

        Args:
            **least: Name and minimum of further settings; batch_size and num_workers are always checked.

        Raises:
            ConfigError: A setting is below its minimum.
        """
        for name, smallest in {"batch_size": 1, "num_workers": 0, **least}.items():
            value = self.hparams[name]
            if value is not None and value < smallest:
                raise ConfigError(f"data.{name} must be at least {smallest}; got {value}.")


def list_skipped(skipped: Sequence[str]) -> list[str]:
    """The last lines of a run: which images could not be read, the first few of many."""
    if not skipped:
        return []
    lines = [f"Skipped because unreadable: {len(skipped)} image{'s' if len(skipped) > 1 else ''}"]
    lines += [f"  {why}" for why in skipped[:_LISTED]]
    return lines + ([f"  and {len(skipped) - _LISTED} more"] if len(skipped) > _LISTED else [])
