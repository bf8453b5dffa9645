"""Loading that resumes exactly: the randomness of a sample and the position of a batch depend on seed, epoch and index.

`EpochSampler` yields keys (sample, epoch); `SeededDataset` draws a sample's augmentation from a hash of seed, epoch
and index, whatever process loads it; `ResumableLoader` counts the batches it has yielded and restarts after them.
A resumed run therefore sees the batches that it would have seen without interruption, with any number of workers.
Nothing here draws from the global random generators, which belong to the model.

Streams (WebDataset, TFDS, streamed Hugging Face datasets) cannot seek: `StreamLoader` resumes exactly only at the end
of an epoch, and warns otherwise.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from visionattn.data.skipping import SampleKey, SkippingCollate, SkippingDataset
from visionattn.errors import ConfigError, VisionAttnError

__all__ = [
    "IGNORED",
    "BalancedSampler",
    "EpochSampler",
    "ResumableLoader",
    "SampleKey",
    "SeededDataset",
    "StreamLoader",
]

# Label of copies that fill the last batches of an evaluation on several devices; losses and metrics skip it.
IGNORED = -1


class EpochSampler(DistributedSampler):
    """Distributed sampler of `SampleKey`s that can start inside an epoch.

    Training drops the few samples that are left after dividing by the number of ranks. Evaluation repeats some instead,
    since batch counts must agree, and marks them as copies, so that each sample counts exactly once.

    Args:
        dataset: Dataset with a length.
        num_replicas: Number of ranks.
        rank: This rank.
        training: Reshuffle each epoch and drop, or keep the order and mark copies.
        seed: Seed of the shuffling.
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int, training: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=training, seed=seed, drop_last=training)
        self.size = len(dataset)
        self.start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        # Evaluation uses the same samples each time, even if the dataset draws them per epoch.
        epoch = self.epoch if self.shuffle else 0
        for position, sample in enumerate(super().__iter__()):
            if position >= self.start:
                yield SampleKey(sample, epoch, is_copy=position * self.num_replicas + self.rank >= self.size)


class BalancedSampler(EpochSampler):
    """Training sampler that draws each class equally often, with repeats; an epoch keeps its length.

    Args:
        dataset: Dataset with a length.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the drawing.
        labels: Label of each sample.
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int, seed: int, labels: Sequence[int]) -> None:
        super().__init__(dataset, num_replicas, rank, training=True, seed=seed)
        given = torch.tensor(labels)
        self.weights = 1.0 / given.bincount()[given].double()

    def __iter__(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.total_size, replacement=True, generator=generator)
        for sample in drawn[self.rank :: self.num_replicas][self.start :].tolist():
            yield SampleKey(sample, self.epoch)


@contextlib.contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seed torch's CPU generator, numpy and random, and restore their states afterwards."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(entropy).generate_state(3).tolist()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # torch.manual_seed would also reseed the GPUs, whose states are not restored.
    torch.default_generator.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class SeededDataset(SkippingDataset):
    """A dataset of (image, label) read by `SampleKey`, with a transform seeded by seed, epoch and index.

    Args:
        dataset: Map-style dataset of (PIL image, label).
        transform: Image -> tensor, or any other form of sample.
        seed: Seed of the augmentation; None if the transform is deterministic.
        training: The replacement of an unreadable image counts as a sample, not as a copy.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], seed: int | None, training: bool = False) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.training = training

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | int) -> tuple[Any, ...]:
        # Lightning's overfit_batches and prediction use their own samplers, which yield plain indices.
        sample, epoch, is_copy = key if isinstance(key, SampleKey) else SampleKey(key, epoch=0)
        image, label = self.dataset[sample]
        with contextlib.nullcontext() if self.seed is None else _seeded(self.seed, epoch, sample):
            image = self.transform(image)
        return image, IGNORED if is_copy else label


class ResumableLoader(DataLoader):
    """DataLoader over an `EpochSampler` whose position Lightning keeps in its checkpoints.

    `state_dict()` counts the batches yielded in this epoch; after `load_state_dict()` the first iteration of that
    epoch starts after them without loading them. Pass it its own generator: creating an iterator draws a number.
    Unreadable samples of a `SkippingDataset` are skipped and recorded in its `skipped`.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dataset, SkippingDataset):
            kwargs["collate_fn"] = SkippingCollate(kwargs.get("collate_fn"))
        super().__init__(dataset, *args, **kwargs)

    # Class attributes, since Lightning rebuilds loaders from the arguments of their constructor.
    _epoch = 0
    _batches = 0
    _resume: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts at the first batch: Lightning creates the iterator before it tells the sampler the epoch.
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            yield from self._batches_read()
            return
        epoch, batches = self._resume
        self._epoch, self._batches, self._resume = sampler.epoch, batches if epoch == sampler.epoch else 0, (0, 0)
        sampler.start = self._batches * (self.batch_size or 1)
        for batch in self._batches_read():
            self._batches += 1
            yield batch

    def _batches_read(self) -> Iterator[Any]:
        for batch in _plain_errors(super().__iter__()):
            if isinstance(self.collate_fn, SkippingCollate):
                batch, skipped = batch
                if skipped:
                    self.dataset.note(skipped)  # type: ignore[attr-defined]
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, in plain numbers."""
        epoch, batches = self._resume if any(self._resume) else (self._epoch, self._batches)
        return {
            "epoch": epoch,
            "batches": batches,
            "batch_size": self.batch_size,
            "num_replicas": getattr(self.sampler, "num_replicas", 1),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position from `state_dict()`.

        Raises:
            ConfigError: The position is inside an epoch, and the batches are now divided differently.
        """
        epoch, batches = state["epoch"], state["batches"]
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        now = self.state_dict()
        for key, words in (("batch_size", "batches of {}"), ("num_replicas", "{} devices")):
            if batches and state[key] != now[key]:
                raise ConfigError(
                    f"The checkpoint is inside an epoch that was divided into {words.format(state[key])}; now it is "
                    f"{words.format(now[key])}. Resume with the same number, or from the end of an epoch."
                )
        self._resume = (epoch, batches)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(epoch)


class StreamLoader(DataLoader):
    """DataLoader over a stream whose shuffling and augmentation depend on seed and epoch.

    Args:
        dataset: Stream with `set_epoch`.
        current_epoch: Called at the first batch of each epoch.
        seed: Seed of the workers.
        **kwargs: Arguments of `DataLoader`.
    """

    def __init__(self, dataset: Any, current_epoch: Callable[[], int], seed: int, **kwargs: Any) -> None:
        super().__init__(dataset, generator=torch.Generator(), **kwargs)
        self._stream = dataset
        self._current_epoch = current_epoch
        self._seed = seed
        self._batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = self._current_epoch()
        self._stream.set_epoch(epoch)
        self.generator.manual_seed(int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]))
        self._batches = 0
        for batch in _plain_errors(super().__iter__()):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches yielded, to report what is repeated."""
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warn if the position is inside an epoch."""
        if 0 < state["batches"] < len(self):
            warnings.warn(
                f"The checkpoint is {state['batches']} batches inside an epoch, and streamed data cannot seek: "
                "the rest of this epoch restarts at the beginning of the stream. To continue exactly, resume from a "
                "checkpoint at the end of an epoch.",
                stacklevel=2,
            )


def _plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; for this package's errors, remove the traceback that a worker process wraps around the message."""
    try:
        yield from batches
    except VisionAttnError as error:
        name = type(error).__name__
        raise type(error)(str(error).rsplit(f"{name}: ", 1)[-1].strip()) from None
