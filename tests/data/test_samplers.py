"""Batches and augmentation follow from seed, epoch and index alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import v2

from visionattn.data.samplers import IGNORED, EpochSampler, ResumableLoader, SampleKey, SeededDataset, StreamLoader
from visionattn.errors import ConfigError, DataError


class Numbers(Dataset):
    """Sample i is (i, i)."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == 90:
            raise DataError("Sample 90 is broken.")
        return index, index


def draw(value):
    """A transform that draws from all three global generators."""
    return torch.tensor([value, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


def loader(size=22, num_workers=0, epoch=0, seed=3, **kwargs):
    dataset = SeededDataset(Numbers(size), draw, seed)
    sampler = EpochSampler(dataset, 1, 0, training=True, seed=seed)
    sampler.set_epoch(epoch)
    return ResumableLoader(
        dataset,
        sampler=sampler,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
        **{"batch_size": 4, **kwargs},
    )


def epochs(batches, count):
    """What `count` epochs hand out."""
    found = []
    for epoch in range(count):
        batches.sampler.set_epoch(epoch)
        found.append(torch.stack([values for values, _ in batches]))
    return torch.stack(found)


def test_augmentation_does_not_depend_on_workers():
    alone, two = epochs(loader(), 3), epochs(loader(num_workers=2), 3)
    assert alone.shape == (3, 5, 4, 4)
    assert torch.equal(alone, two)
    # Each sample and each epoch draws numbers of its own.
    assert len(alone.flatten(0, 2)[:, 1].unique()) == 60


def test_loading_does_not_disturb_the_global_generators():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(2), np.random.rand(2), [random.random(), random.random()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = torch.rand(1), np.random.rand(1), random.random()
    list(loader()), list(loader(num_workers=2))
    assert torch.equal(torch.cat([first[0], torch.rand(1)]), expected[0])
    assert [*first[1], *np.random.rand(1)] == list(expected[1])
    assert [first[2], random.random()] == expected[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_behind_the_batches_it_handed_out(num_workers):
    whole = epochs(loader(), 3)
    first = loader(num_workers=num_workers, epoch=1)
    batches = iter(first)
    found = [next(batches)[0], next(batches)[0]]
    assert torch.equal(torch.stack(found), whole[1, :2])
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": 2, "batch_size": 4, "num_replicas": 1}

    second = loader(num_workers=num_workers)
    second.load_state_dict(state)
    assert len(second) == 5
    assert torch.equal(torch.stack([values for values, _ in second]), whole[1, 2:])
    assert second.state_dict()["batches"] == 5
    second.sampler.set_epoch(2)
    assert torch.equal(torch.stack([values for values, _ in second]), whole[2])


def test_skipped_samples_are_not_loaded():
    resumed = loader(num_workers=0)
    resumed.load_state_dict({"epoch": 0, "batches": 4, "batch_size": 4, "num_replicas": 1})
    seen = []
    resumed.dataset.transform = lambda value: seen.append(value) or torch.zeros(1)
    list(resumed)
    assert len(seen) == 4


def test_a_finished_epoch_is_not_resumed():
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 5, "batch_size": 8, "num_replicas": 2})
    assert torch.equal(torch.stack([values for values, _ in resumed]), epochs(loader(), 2)[1])


@pytest.mark.parametrize(
    ("key", "words"), [("batch_size", "batches of 8; now it is batches of 4"), ("num_replicas", "8 dev")]
)
def test_batches_that_are_cut_otherwise_cannot_be_resumed(key, words):
    state = {"epoch": 0, "batches": 2, "batch_size": 4, "num_replicas": 1, key: 8}
    with pytest.raises(ConfigError, match=words):
        loader().load_state_dict(state)


@pytest.mark.parametrize("size", [8, 9, 10, 11])
def test_ranks_share_an_evaluation_exactly(size):
    dataset = SeededDataset(Numbers(size), draw, seed=None)
    ranks = [list(EpochSampler(dataset, 4, rank, training=False, seed=0)) for rank in range(4)]
    assert len({len(keys) for keys in ranks}) == 1
    real = [key.sample for keys in ranks for key in keys if not key.is_copy]
    assert sorted(real) == list(range(size))
    labels = [dataset[key][1] for keys in ranks for key in keys]
    assert labels.count(IGNORED) == -size % 4


@pytest.mark.parametrize("size", [8, 9, 11])
def test_ranks_share_an_epoch_without_repeats(size):
    dataset = Numbers(size)
    ranks = [list(EpochSampler(dataset, 4, rank, training=True, seed=0)) for rank in range(4)]
    assert [len(keys) for keys in ranks] == [2, 2, 2, 2]
    assert max(Counter(key.sample for keys in ranks for key in keys).values()) == 1
    assert not any(key.is_copy for keys in ranks for key in keys)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_keep_their_own_words(num_workers):
    with pytest.raises(DataError) as raised:
        list(ResumableLoader(Numbers(100), batch_size=4, num_workers=num_workers))
    assert str(raised.value) == "Sample 90 is broken."


def test_bare_indices_are_read_as_of_the_first_epoch():
    dataset = SeededDataset(Numbers(5), draw, seed=0)
    assert torch.equal(dataset[2][0], dataset[SampleKey(2, 0)][0])
    assert not torch.equal(dataset[2][0], dataset[SampleKey(2, 1)][0])


class Stream(IterableDataset):
    """Counts up from 100 times the epoch, with a draw beside each number."""

    def __init__(self):
        self.epoch = None

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        numbers = range(worker.id, 8, worker.num_workers) if worker else range(8)
        return ((100 * self.epoch + number, torch.rand(())) for number in numbers)


def stream(epoch, seed=0):
    batches = StreamLoader(Stream(), lambda: epoch, seed, batch_size=2, num_workers=2)
    return batches, [torch.stack([numbers.double(), draws.double()]) for numbers, draws in batches]


def test_stream_is_told_the_epoch_and_seeded_by_it():
    _, first = stream(3)
    _, again = stream(3)
    _, later = stream(4)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert sorted(torch.stack(first)[:, 0].flatten().tolist()) == list(range(300, 308))
    assert not set(torch.stack(first)[:, 1].flatten().tolist()) & set(torch.stack(later)[:, 1].flatten().tolist())


def test_stream_says_that_it_cannot_be_sought(recwarn):
    batches, _ = stream(0)
    batches.load_state_dict({"batches": 4})
    assert not recwarn
    with pytest.warns(UserWarning, match=r"is 2 batches inside an epoch, and streamed data cannot seek"):
        batches.load_state_dict({"batches": 2})


def test_torchvision_transforms_draw_from_torch_alone():
    # SeededDataset seeds them only if so.
    transform = v2.Compose([v2.TrivialAugmentWide(), v2.RandomHorizontalFlip(), v2.RandomAffine(10)])
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(), random.seed()
        results.append(torch.stack([transform(image) for _ in range(5)]))
    assert torch.equal(*results)


def test_evaluation_has_the_same_samples_each_epoch():
    sampler = EpochSampler(range(5), 1, 0, training=False, seed=0)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first
