from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from tests.probe.arrays import ArrayFeatures, clustered
from visionattn.errors import DataError, InputError
from visionattn.probe.knn import channel_statistics, nearest_neighbours
from visionattn.probe.sweep import hold_out

KS, TEMPERATURES = (1, 5, 20), (0.07, 0.5)
small = partial(nearest_neighbours, ks=KS, temperatures=TEMPERATURES, train_chunk=37, test_chunk=16)


def features(dtype=torch.float64):
    return clustered(200, noise=4.0, dtype=dtype), clustered(51, noise=4.0, seed=1, dtype=dtype)


def vectors(given, source):
    x = given.class_tokens[0] if source == "class" else given.patches[0].mean(1)
    return torch.nn.functional.normalize(x, dim=1).numpy()


@pytest.mark.parametrize("source", ["class", "mean"])
def test_equals_sklearn(source):
    train, test = features()
    found = small(train, test, source=source)
    assert [(pair.k, pair.temperature) for pair in found.pairs] == [(k, t) for k in KS for t in TEMPERATURES]
    kept, held = (rows.numpy() for rows in hold_out(train.labels, torch.arange(200), 0.1, 0))
    x, labels = vectors(train, source), train.labels.numpy()
    for pair in found.pairs:

        def weights(distance, temperature=pair.temperature):
            return torch.from_numpy((1 - distance) / temperature).exp().numpy()

        brute = partial(KNeighborsClassifier, pair.k, metric="cosine", algorithm="brute", weights=weights)
        expected = brute().fit(x, labels).predict_proba(vectors(test, source))
        assert pair.predictions.tolist() == expected.argmax(1).tolist()
        assert pair.confidences.numpy() == pytest.approx(expected.max(1), rel=1e-9)
        assert pair.held_out_accuracy == pytest.approx(brute().fit(x[kept], labels[kept]).score(x[held], labels[held]))
    assert found.chosen.held_out_accuracy == max(pair.held_out_accuracy for pair in found.pairs)
    assert sum(row["chosen"] for row in found.rows()) == 1


@pytest.mark.parametrize("source", ["class", "mean"])
def test_standardised_channels_are_those_of_sklearn(source):
    train, test = features()
    for given in (train, test):  # a channel that outshines the others, and one that never changes
        for tokens in (given.patches[0], given.class_tokens[0]):
            tokens[..., 2] = 1000 + 100 * tokens[..., 2]
            tokens[..., 5] = 3.3
    scaled = []
    for given in (train, test):
        x = given.class_tokens[0] if source == "class" else given.patches[0].mean(1)
        scaled.append(x.numpy())
    scaler = StandardScaler().fit(scaled[0])
    expected = [ArrayFeatures([torch.from_numpy(scaler.transform(x)[:, None])], given.labels, 3)
                for x, given in zip(scaled, (train, test), strict=True)]  # fmt: skip
    found = small(train, test, source=source, standardize=True)
    handed = small(train, test, source=source, standardize=channel_statistics(train, 7)[0, source])
    for pair, other, reference in zip(found.pairs, handed.pairs, small(*expected, source="mean").pairs, strict=True):
        assert torch.equal(pair.predictions, reference.predictions)
        assert torch.equal(pair.predictions, other.predictions)
        torch.testing.assert_close(pair.confidences, reference.confidences, rtol=1e-9, atol=1e-9)
    assert found.chosen.accuracy > small(train, test, source=source).chosen.accuracy


def test_chunks_do_not_matter():
    train, test = features()
    for chunks in ((7, 3), (500, 500), (1, 51)):
        found = small(train, test, train_chunk=chunks[0], test_chunk=chunks[1])
        for pair, expected in zip(found.pairs, small(train, test).pairs, strict=True):
            assert torch.equal(pair.predictions, expected.predictions)
            torch.testing.assert_close(pair.confidences, expected.confidences, rtol=1e-12, atol=0)


@pytest.mark.parametrize("train_chunk", [1, 4, 100])
def test_of_equally_near_images_the_first_count(train_chunk):
    # Small whole numbers: all similarities are the same number, bit by bit.
    labels = torch.tensor([2, 1, 1, 0, 0, 0, 2, 2])
    train = ArrayFeatures([torch.tensor([3.0, 4.0]).expand(8, 1, 2)], labels, 3)
    test = ArrayFeatures([torch.tensor([3.0, 4.0]).expand(3, 1, 2)], torch.tensor([0, 1, 2]), 3)
    for k, winner in {1: 2, 3: 1, 5: 0, 7: 0, 8: 0}.items():  # 5: two of class 0 and of 1, the lower class wins
        found = nearest_neighbours(train, test, 0, "mean", [k], [0.1], holdout=0, train_chunk=train_chunk)
        assert found.chosen.predictions.tolist() == [winner] * 3


def test_k_is_clipped_to_the_images_that_vote_for_the_held_out():
    train, test = features()
    found = nearest_neighbours(train, test, ks=(5, 200, 10**6), temperatures=(0.1,))
    assert [pair.k for pair in found.pairs] == [5, len(hold_out(train.labels, torch.arange(200), 0.1, 0)[0])]


def test_a_small_temperature_does_not_overflow():
    train, test = features()
    found = nearest_neighbours(train, test, ks=(5,), temperatures=(1e-4,))
    assert found.chosen.confidences.isfinite().all()
    nearest = nearest_neighbours(train, test, ks=(1,), temperatures=(1.0,))
    assert torch.equal(found.chosen.predictions, nearest.chosen.predictions)


def process(rank, processes, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    torch.save(result(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def result():
    found = small(*features(torch.float32))
    return [(p.predictions, p.confidences, p.held_out_accuracy) for p in found.pairs], found.chosen.k


def test_two_processes_equal_one(tmp_path):
    # Forked, which spares them the imports.
    mp.start_processes(process, (2, str(tmp_path)), nprocs=2, start_method="fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs, k = result()
    torch.set_num_threads(threads)
    for rank in range(2):
        other_pairs, other_k = torch.load(tmp_path / f"{rank}.pt")
        assert other_k == k
        for pair, other in zip(pairs, other_pairs, strict=True):
            assert torch.equal(pair[0], other[0])
            assert torch.equal(pair[1], other[1])
            assert pair[2] == other[2]


def test_what_cannot_be_searched():
    train, test = features()
    with pytest.raises(InputError, match="no class token: use the source 'mean'"):
        small(ArrayFeatures(train.patches, train.labels, 3), ArrayFeatures(test.patches, test.labels, 3))
    with pytest.raises(InputError, match="requires held-out training images"):
        small(train, test, holdout=0)
    with pytest.raises(InputError, match="same layers"):
        small(train, clustered(9, classes=4))
    train.class_tokens[0][11] = torch.nan
    with pytest.raises(DataError, match="row 11"):
        small(train, test)
