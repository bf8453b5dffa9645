"""Triplets of images, for training retrieval: `visionattn fit` with `TripletTask`.

Training batches are images (3 B, 3, H, W), anchor, far and near of each triplet in turn, and conditions int64 (B,).
Validation and test embed each image of the triplets once: batches are images (B, 3, H, W) and their indices in the
names of the split (B,), `IGNORED` for the copies that equalise the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionattn.data.retrieval.catalogue_files import Triplets, read_triplets
from visionattn.data.retrieval.datamodule import EmbeddingData
from visionattn.data.samplers import EpochSampler, SeededDataset

__all__ = ["TripletData", "TripletImages"]


class TripletImages(Dataset):
    """Anchor, far and near image of each triplet, with its condition."""

    def __init__(self, given: Triplets) -> None:
        self.given = given
        self.rows = torch.stack([given.anchors, given.far, given.near], dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        given = self.given
        images = [given.images.open(given.names[row]) for row in self.rows[index].tolist()]
        return images, int(given.condition[index])


class _EveryImage(Dataset):
    """Each image of the triplets, with its index."""

    def __init__(self, given: Triplets) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.given.images.open(self.given.names[index]), index


def _stack(transform: Callable[[Image.Image], Tensor], images: list[Image.Image]) -> Tensor:
    """Images, each transformed separately -> (3, 3, H, W)."""
    return torch.stack([transform(image) for image in images])


def _collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Triplets -> a batch whose first axis runs over images, as in all tasks."""
    images, conditions = zip(*rows)
    return torch.cat(images), torch.tensor(conditions)


class TripletData(EmbeddingData):
    """Training, validation and test triplets in the layout of Zappos (see `visionattn.data.retrieval.catalogue_files`).

    An epoch has each training triplet once, in a new random order; `trainer.limit_train_batches` shortens it
    to other triplets each time. Sizes and normalisation that are not given follow from the model.

    Args:
        root: Folder with filenames.json and tripletlists/.
        images: Folder or zip file of the images; None uses the default of the layout.
        triplets_per_batch: Triplets per training batch and device, each of three images.
        batch_size: Images per batch and device in validation and test.
        image_size: Height and width of the model's input images.
        augmentation: `"none"`, `"shift"`, `"crop-flip"`, `"imagenet"`, or the path of a pipeline saved by
            `albumentations.save`; drawn separately for the three images of a triplet.
        num_workers: Loading processes per device; the results do not depend on it.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: The augmentation is unknown, or a batch has no triplet.
        DataError: Files are missing or damaged.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        triplets_per_batch: int = 64,
        batch_size: int = 64,
        image_size: list[int] | None = None,
        augmentation: str = "crop-flip",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # The logger rejects names that the hyper-parameters of model and data share.
        self.save_hyperparameters(logger=False)
        self.check_augmentation()
        self.check_counts(triplets_per_batch=1)
        self._parts: dict[str, Triplets] = {}

    @property
    def attribute_values(self) -> dict[str, list[str]]:
        """Condition -> an empty list, since triplets have no values; known before the model is created."""
        return {name: [] for name in self.part("train").conditions}

    def part(self, name: str) -> Triplets:
        """The triplets of a split, `"train"`, `"val"` or `"test"`."""
        if name not in self._parts:
            self._parts[name] = read_triplets(self.hparams.root, name, self.hparams.images)
        return self._parts[name]

    def describe(self, split: str) -> str:
        """Number of triplets and images of a split."""
        part = self.part(split)
        return f"{len(part.anchors):,} triplets of {len(part.names):,} images under {len(part.conditions)} conditions"

    def train_dataloader(self) -> DataLoader:
        """Triplets in random order, augmented."""
        given = self.hparams
        transform = partial(_stack, self._train_transform)
        dataset = SeededDataset(TripletImages(self.part("train")), transform, given.seed, training=True)
        dataset.files = len(self.part("train").names)
        sampler = EpochSampler(dataset, *self._ranks, training=True, seed=given.seed)
        return self._loader(dataset, sampler, given.triplets_per_batch, _collate)

    def val_dataloader(self) -> DataLoader:
        """The images of the validation triplets, each once."""
        return self._in_order(SeededDataset(_EveryImage(self.part("val")), self._eval_transform, None))

    def test_dataloader(self) -> DataLoader:
        """The images of the test triplets, each once."""
        return self._in_order(SeededDataset(_EveryImage(self.part("test")), self._eval_transform, None))
