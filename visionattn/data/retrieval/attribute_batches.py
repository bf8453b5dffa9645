"""Batches with several images of several values per attribute, as pair and triplet losses need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from visionattn.data.retrieval.catalogue import MISSING
from visionattn.data.samplers import EpochSampler, SampleKey
from visionattn.errors import DataError

__all__ = ["AttributeSampler"]


class AttributeSampler(EpochSampler):
    """Sampler whose batches of C P K images hold, attribute after attribute, P values of it and K images of each.

    Values are drawn for each batch. The images of a value are used in random order: none repeats before all have been
    used. Images with a missing value of an attribute are used for other attributes only. A value with fewer
    than K images repeats some, and an attribute with fewer than P values uses more images of each.

    The batches of an epoch depend on seed, epoch and rank alone, so that `ResumableLoader` can begin inside it.

    Args:
        labels: int64 (N, C), `MISSING` where a value is unknown.
        values: P.
        items: K.
        num_replicas: Number of ranks; each draws its own batches.
        rank: This rank.
        seed: Seed of the draws.

    Raises:
        DataError: No image has a value of some attribute.
    """

    def __init__(self, labels: Tensor, values: int, items: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(labels, num_replicas, rank, training=True, seed=seed)
        self.values = values
        self.items = items
        self.batch_size = labels.shape[1] * values * items
        self.batches = max(1, len(labels) // (self.batch_size * num_replicas))
        self._members: list[list[np.ndarray]] = []
        for column in labels.T.numpy():
            groups = [np.flatnonzero(column == label) for label in np.unique(column[column != MISSING])]
            if not groups:
                raise DataError("No training image has a value of one of the attributes.")
            self._members.append(groups)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        generator = np.random.default_rng((self.seed, epoch, self.rank))
        images = [[_turns(members, generator) for members in groups] for groups in self._members]
        position = 0
        for _ in range(self.batches):
            for groups in images:
                for group in itertools.islice(_turns(np.arange(len(groups)), generator), self.values):
                    for sample in itertools.islice(groups[group], self.items):
                        if position >= self.start:
                            yield SampleKey(sample, epoch)
                        position += 1


def _turns(members: np.ndarray, generator: np.random.Generator) -> Iterator[int]:
    """The members in random order, repeated for ever."""
    while True:
        yield from generator.permutation(members).tolist()
