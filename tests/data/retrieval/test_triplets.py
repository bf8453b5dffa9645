"""Triplets to train on: what is read, refused, drawn and handed out again after a stop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")

from tests.retrieval_toys import TOY_CONDITIONS, write_triplets
from visionattn.data.retrieval.catalogue_files import read_triplets
from visionattn.data.retrieval.triplets import TripletData, TripletImages
from visionattn.errors import ConfigError, DataError


def data(root, **settings):
    made = TripletData(str(root), **{"triplets_per_batch": 10, "batch_size": 8, **settings})
    config = {"size": [24, 24], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    made.trainer = SimpleNamespace(lightning_module=SimpleNamespace(input_config=config), world_size=1, global_rank=0)
    made.setup("fit")
    return made


def test_conditions_are_known_before_the_model(tmp_path):
    found = TripletData(str(write_triplets(tmp_path)))
    assert found.attribute_values == {name: [] for name in TOY_CONDITIONS}


def test_training_batches_are_triplets_with_their_conditions(tmp_path):
    root = write_triplets(tmp_path)
    found = data(root, augmentation="none")
    batches = list(found.train_dataloader())
    assert [len(conditions) for _, conditions in batches] == [10, 10, 10, 10, 8]
    assert batches[0][0].shape == (30, 3, 24, 24)
    files = [root / f"tripletlists/{name}_tripletlist_train.txt" for name in TOY_CONDITIONS]
    lines = [(c, line.split()) for c, file in enumerate(files) for line in file.read_text().splitlines()]
    expected = sorted((c, *map(int, words)) for c, words in lines)
    # Which image a tensor shows is found by comparing it with all.
    names = (root / "filenames.json").read_text().split()
    store = found.part("train").images
    shown = torch.stack([found._eval_transform(store.open(name)) for name in names]).flatten(1)
    seen = []
    for images, conditions in batches:
        distances = torch.cdist(images.flatten(1), shown)
        assert distances.amin(dim=1).max() < 0.1
        numbers = distances.argmin(dim=1).view(-1, 3)
        seen += [(c, *row) for c, row in zip(conditions.tolist(), numbers.tolist())]
    assert sorted(seen) == expected
    assert seen != expected  # in an order of its own


def test_evaluation_has_each_image_once(tmp_path):
    found = data(write_triplets(tmp_path))
    given = found.part("val")
    batches = list(found.val_dataloader())
    assert torch.cat([places for _, places in batches]).tolist() == list(range(len(given.names)))
    assert torch.equal(batches[0][0][3], found._eval_transform(given.images.open(given.names[3])))


def test_the_images_of_a_triplet_are_augmented_apart_and_alike_again(tmp_path):
    found = data(write_triplets(tmp_path), augmentation="shift")
    given = found.part("train")
    same = given._replace(far=given.anchors, near=given.anchors)
    found._parts["train"] = same
    (images, _), *_ = first = list(found.train_dataloader())
    assert not torch.equal(images[0::3], images[1::3])
    for one, two in zip(first, found.train_dataloader(), strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_an_epoch_goes_on_where_it_was_left(tmp_path):
    found = data(write_triplets(tmp_path))
    whole = [images for images, _ in found.train_dataloader()]
    left, again = found.train_dataloader(), found.train_dataloader()
    iterator = iter(left)
    next(iterator), next(iterator)
    again.load_state_dict(left.state_dict())
    rest = [images for images, _ in again]
    assert len(rest) == 3
    assert all(torch.equal(one, two) for one, two in zip(rest, whole[2:]))


def test_triplets_among_some_images(tmp_path):
    given = read_triplets(write_triplets(tmp_path), "val")
    order = torch.randperm(len(given.names))[:12]
    taken = given.take(order)

    def rows(triplets):
        numbers = zip(*(own.tolist() for own in triplets[3:]))
        return [(*(triplets.names[number] for number in row[:3]), triplets.conditions[row[3]]) for row in numbers]

    assert taken.names == [given.names[place] for place in order]
    assert 0 < len(taken.anchors) < len(given.anchors)
    assert rows(taken) == [row for row in rows(given) if set(row[:3]) <= set(taken.names)]


def test_images_of_a_triplet_are_anchor_far_and_near(tmp_path):
    given = read_triplets(write_triplets(tmp_path), "train")
    images, condition = TripletImages(given)[17]
    for image, row in zip(images, (given.anchors[17], given.far[17], given.near[17]), strict=True):
        assert image.tobytes() == given.images.open(given.names[row]).tobytes()
    assert condition == given.condition[17]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"augmentation": "autoaugment"}, "augmentation must be one of .*; got 'autoaugment'"),
        ({"triplets_per_batch": 0}, "triplets_per_batch must be at least 1; got 0"),
        ({"image_size": [24]}, "height and width"),
    ],
)
def test_wrong_settings(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        data(tmp_path, **settings)


LISTS = "tripletlists/heel_tripletlist_train.txt"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (LISTS, b"0 1\n", "has the invalid line '0 1': it must hold the indices of anchor, far and near"),
        (LISTS, b"0 1 -2\n", "has the invalid line '0 1 -2'"),
        (LISTS, "0 1 ²\n".encode(), "has the invalid line '0 1 ²'"),
        (LISTS, b"0 1 54\n", "each below 54, the number of names in filenames.json"),
        (LISTS, None, r"Could not read .*heel_tripletlist_train\.txt"),
        (LISTS, b"\xff\xfe", r"Could not read .*heel_tripletlist_train\.txt"),
        ("filenames.json", None, r"Could not read .*filenames\.json"),
        ("filenames.json", b'["Shoes/00.png", ', r"filenames\.json as a JSON list or one name per line"),
        (LISTS, b"0 1 " + b"9" * 5000, "has the invalid line '0 1 9"),
        ("filenames.json", b"[" * 10**5, r"filenames\.json as a JSON list or one name per line"),
        (
            "filenames.json",
            b"[1, 2]",
            r"filenames\.json must be a JSON list of names or one name per line; some are not names",
        ),
        ("filenames.json", b"\xff\xfe", r"filenames\.json as a JSON list or one name per line"),
        ("filenames.json", b"Shoes/else.png\n" * 54, r"has no images for 1 names, such as Shoes/else\.png"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, words):
    root = write_triplets(tmp_path)
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_triplets(root, "train")


def test_nothing_to_read(tmp_path):
    root = write_triplets(tmp_path)
    with pytest.raises(ConfigError, match=r"part must be one of 'train', 'val', 'test'; got 'valid'"):
        read_triplets(root, "valid")
    for name in TOY_CONDITIONS:
        (root / f"tripletlists/{name}_tripletlist_test.txt").write_text("\n")
    with pytest.raises(DataError, match="No triplets of the split 'test' were found"):
        read_triplets(root, "test")
    with pytest.raises(DataError, match="neither a folder nor a zip file"):
        read_triplets(tmp_path / "nowhere", "train")
