"""Pairs of images, to train a pair encoder and an embedding on in turn: `visionattn fit` with `RerankTask`.

Training batches are images (2 B, 3, H, W), the first and second of each pair in turn, and the pairs' numbers (B,).
Which images make a pair is chosen by the task, from its embeddings: each image with its nearest ones and with others
at random. Values of attributes are only read to validate and test.
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

CELLS = 2**24  # numbers of a chunk of the matrix of cosines


def choose_pairs(embeddings: Tensor, neighbours: int, others: int, seed: int) -> Tensor:
    """Each image with its nearest ones and with others drawn at random, never with itself.

    Args:
        embeddings: L2-normalised, (N, E).
        neighbours: Nearest images, below N.
        others: Images at random; they can be near, or drawn twice.
        seed: Seed of the drawing.

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
    """Both images of each pair, with its number."""

    def __init__(self, store: ImageStore, names: list[str], pairs: Tensor) -> None:
        self.store, self.names, self.pairs = store, names, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        return [self.store.open(self.names[row]) for row in self.pairs[index].tolist()], index


def _stack(transform: Callable[[Image.Image], Tensor], images: list[Image.Image]) -> Tensor:
    """Images, each transformed by itself -> (2, 3, H, W)."""
    return torch.stack([transform(image) for image in images])


def _collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, numbers = zip(*rows)
    return torch.cat(images), torch.tensor(numbers)


class PairData(RetrieveData):
    """Training pairs, and validation and test items of retrieval.

    Args:
        root: As of `RetrieveData`, and so are layout, images, attributes, min_count, image_size, augmentation,
            num_workers and seed.
        neighbours: Nearest images that each image is paired with.
        others: Further ones, at random.
        pairs_per_batch: Pairs of a training batch, each of two images.
        batch_size: Images per batch in validation and test.

    Attributes:
        pairs: int64 (P, 2), places in the training part; the task fills it before training begins.

    Raises:
        ConfigError: As `RetrieveData`, or the training part has no more images than `neighbours`.
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
        """Which images make each pair; worker processes see what is written into it."""
        given, count = self.hparams, len(self.part("train").images)
        if given.neighbours >= count:
            raise ConfigError(
                f"data.neighbours must be below the {count} training images, each of which is paired with others; got "
                f"{given.neighbours}."
            )
        return torch.zeros(count * (given.neighbours + given.others), 2, dtype=torch.int64).share_memory_()

    def choose(self, embeddings: Tensor) -> None:
        """Fill `pairs` by the L2-normalised embeddings (N, E) of the training images, in their order."""
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
        """The training images in order, each once, as those of a validation."""
        return self._ordered("train")
