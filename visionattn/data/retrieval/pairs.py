"""Pairs of images for alternating training of a pair encoder and an embedding: `visionattn fit` with `RerankTask`.

Training batches are images (2 B, 3, H, W), the two images of each pair in turn, and the indices of the pairs (B,). The
task chooses the pairs by its embeddings: each image with its nearest ones and with random ones. Attribute values are
used only for validation and test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionattn.data.retrieval.catalogue import ImageStore
from visionattn.data.retrieval.datamodule import RetrieveData
from visionattn.data.samplers import EpochSampler, SeededDataset
from visionattn.errors import ConfigError

__all__ = ["PairData", "choose_pairs"]

CELLS = 2**24  # elements per chunk of the matrix of cosines


def choose_pairs(embeddings: Tensor, neighbours: int, others: int, seed: int) -> Tensor:
    """Pair each image with its nearest ones and with random ones, never with itself.

    Args:
        embeddings: L2-normalised embeddings (N, E).
        neighbours: Number of nearest images per image, below N.
        others: Number of random images per image; they can be near, or drawn twice.
        seed: Seed of the random images.

    Returns:
        int64 (N (neighbours + others), 2), on the CPU.
    """
    count = len(embeddings)
    rows = torch.arange(count)
    nearest = []
    for chunk in rows.split(max(1, CELLS // count)):
        cosines = embeddings[chunk] @ embeddings.T
        cosines[torch.arange(len(chunk)), chunk] = -torch.inf
        nearest.append(cosines.topk(neighbours, dim=1).indices.cpu())
    offsets = torch.randint(1, count, (count, others), generator=torch.Generator().manual_seed(seed))
    partners = torch.cat([torch.cat(nearest), (rows[:, None] + offsets) % count], dim=1)
    return torch.stack([rows[:, None].expand_as(partners), partners], dim=-1).flatten(0, 1)


class _PairImages(Dataset):
    """Both images of each pair, and the index of the pair."""

    def __init__(self, store: ImageStore, names: list[str], pairs: Tensor) -> None:
        self.store, self.names, self.pairs = store, names, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        return [self.store.open(self.names[row]) for row in self.pairs[index].tolist()], index


def _stack(transform: Callable[[Image.Image], Tensor], images: list[Image.Image]) -> Tensor:
    """Transform the images separately and stack them: (2, 3, H, W)."""
    return torch.stack([transform(image) for image in images])


def _collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, numbers = zip(*rows)
    return torch.cat(images), torch.tensor(numbers)


class PairData(RetrieveData):
    """Training pairs, and validation and test items of retrieval.

    Args:
        root: See `RetrieveData`, also for layout, images, attributes, min_count, image_size, augmentation,
            num_workers and seed.
        neighbours: Number of nearest images that each image is paired with.
        others: Number of random images that each image is paired with.
        pairs_per_batch: Pairs per training batch, each of two images.
        batch_size: Images per batch in validation and test.

    Attributes:
        pairs: int64 (P, 2), indices in the training split; the task fills it before training starts.

    Raises:
        ConfigError: As `RetrieveData`, or `neighbours` is not below the number of training images.
        DataError: Files are missing or damaged.
    """

    def __init__(
        self,
        root: str,
        layout: str = "table",
        images: str | None = None,
        attributes: list[str] | None = None,
        min_count: int = 0,
        neighbours: int = 20,
        others: int = 20,
        pairs_per_batch: int = 32,
        batch_size: int = 64,
        image_size: list[int] | None = None,
        augmentation: str = "none",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            layout,
            images,
            attributes,
            min_count,
            batch_size=batch_size,
            image_size=image_size,
            augmentation=augmentation,
            num_workers=num_workers,
            seed=seed,
        )
        self.check_counts(neighbours=1, others=0, pairs_per_batch=1)

    @cached_property
    def pairs(self) -> Tensor:
        """Indices of the images of each pair, in memory shared with worker processes."""
        given, count = self.hparams, len(self.part("train").images)
        if given.neighbours >= count:
            raise ConfigError(
                f"data.neighbours must be below the number of training images, {count}; got {given.neighbours}."
            )
        return torch.zeros(count * (given.neighbours + given.others), 2, dtype=torch.int64).share_memory_()

    def choose(self, embeddings: Tensor) -> None:
        """Fill `pairs` from the L2-normalised embeddings (N, E) of the training images, in their order."""
        given = self.hparams
        self.pairs.copy_(choose_pairs(embeddings, given.neighbours, given.others, given.seed))

    def train_dataloader(self) -> DataLoader:
        """The pairs in random order."""
        given = self.hparams
        images = _PairImages(self.catalogue.images, self.part("train").images, self.pairs)
        dataset = SeededDataset(images, partial(_stack, self._train_transform), given.seed, training=True)
        dataset.files = len(self.part("train").images)
        sampler = EpochSampler(dataset, *self._ranks, training=True, seed=given.seed)
        return self._loader(dataset, sampler, given.pairs_per_batch, _collate)

    def train_images(self) -> DataLoader:
        """Training images in order, each once, with evaluation transforms."""
        return self._ordered("train")
