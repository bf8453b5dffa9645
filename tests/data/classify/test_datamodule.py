"""The data module: parts, sizes, augmentation and what timm's readers bring."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

pytest.importorskip("lightning")

from timm.data.dataset import IterableImageDataset

from visionattn.data.classify.datamodule import ClassifyData
from visionattn.data.samplers import IGNORED, StreamLoader
from visionattn.errors import ConfigError, DataError, MissingPackageError

COLOUR = {"image_size": 16, "in_chans": 3, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def write(folder, classes, count=4, size=(24, 18), mode="RGB"):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            colour = (60 * number, 20 * image, 99)
            Image.new("RGB", size, colour).convert(mode).save(folder / name / f"{image}.png")


def opened(**settings):
    data = ClassifyData(**{**COLOUR, **settings})
    data.setup("fit")
    return data


def first(loader):
    return next(iter(loader))


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop-flip", "imagenet"])
def test_digits(augmentation):
    data = opened(augmentation=augmentation, batch_size=32)
    assert data.num_classes == 10
    images, labels = first(data.train_dataloader())
    assert images.shape == (32, 3, 16, 16)
    assert labels.dtype == torch.int64
    # Grey digits in a colour model: the three channels agree unless colours are augmented.
    if augmentation != "imagenet":
        assert torch.equal(images[:, 0], images[:, 2])
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [
        33, 12, 12,
    ]  # fmt: skip


def test_evaluation_shows_every_image_once_and_unchanged():
    data = opened(dataset="digits", image_size=8, augmentation="imagenet", batch_size=50)
    images = torch.cat([images for images, _ in data.val_dataloader()])
    expected = torch.from_numpy(data._part("val").images) / 255
    assert torch.allclose(images[:, 0], expected, rtol=0, atol=1e-6)


def test_normalisation():
    raw = first(opened().val_dataloader())[0]
    scaled = first(opened(mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.5]).val_dataloader())[0]
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.5]).view(3, 1, 1)
    assert torch.allclose(scaled, (raw - mean) / std, atol=1e-5)


def test_folder_with_parts(tmp_path):
    write(tmp_path / "train", ["cat", "dog", "owl"])
    write(tmp_path / "validation", ["dog", "owl"], mode="L")
    data = opened(dataset="folder", root=str(tmp_path), batch_size=4)
    assert data.num_classes == 3
    assert data.class_names == ["cat", "dog", "owl"]
    # Classes are numbered by the training folder.
    assert sorted(label for _, labels in data.val_dataloader() for label in labels.tolist()) == [1] * 4 + [2] * 4
    assert len(data.test_dataloader().dataset) == 8
    assert first(data.train_dataloader())[0].shape == (4, 3, 16, 16)


def test_folder_without_parts_is_held_out_by_class(tmp_path):
    write(tmp_path, ["cat", "dog"], count=10)
    data = opened(dataset="folder", root=str(tmp_path), val_fraction=0.2, batch_size=4)
    train, val = data._source("train"), data._source("val")
    assert (len(train), len(val)) == (16, 4)
    assert set(train.indices).isdisjoint(val.indices)
    assert sorted(label for _, labels in data.val_dataloader() for label in labels.tolist()) == [0, 0, 1, 1]
    again = opened(dataset="folder", root=str(tmp_path), val_fraction=0.2)
    assert again._source("val").indices == val.indices
    # Prediction takes them all, in folders or not.
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    assert len(data.predict_dataloader().dataset) == 21
    assert list(data.predicted_names())[:3] == ["0.png", "cat/0.png", "cat/1.png"]


def test_folder_of_photographs_is_cropped_in_the_middle(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / part / name / "1.png")
    data = opened(dataset="folder", root=str(tmp_path), image_size=20, batch_size=1)
    assert first(data.val_dataloader())[0].min() == 1


def test_each_class_is_held_out_and_trained_on(tmp_path):
    write(tmp_path, ["cat", "dog"], count=25)
    write(tmp_path, ["owl"], count=3)  # a tenth of three rounds to none
    for share, left in ((0.1, 2), (0.9, 1)):
        data = opened(dataset="folder", root=str(tmp_path), val_fraction=share, batch_size=1)
        train, val = (
            [int(label) for _, label in loader] for loader in (data.train_dataloader(), data.val_dataloader())
        )
        assert (train.count(2), val.count(2)) == (left, 3 - left)
        assert len(train) + len(val) == 53
        assert min(train.count(0), train.count(1), val.count(0), val.count(1)) >= 2


def test_wrong_folders(tmp_path):
    (tmp_path / "one.png").touch()
    with pytest.raises(DataError, match=r"There is no folder .*one\.png: it is a file\."):
        opened(dataset="folder", root=str(tmp_path / "one.png")).train_dataloader()
    with pytest.raises(DataError, match=r"There is no folder .*one\.png: it is a file\."):
        opened(dataset="mnist", root=str(tmp_path / "one.png"))
    write(tmp_path / "train", ["cat", "dog"])
    write(tmp_path / "val", ["cat", "dgo"])
    with pytest.raises(DataError, match=r"val has classes that are not in .*train: dgo"):
        opened(dataset="folder", root=str(tmp_path)).val_dataloader()
    write(tmp_path / "other/val", ["cat", "dog"])
    with pytest.raises(DataError, match=r"has no sub-folder 'train', but has .*val"):
        _ = opened(dataset="folder", root=str(tmp_path / "other")).num_classes
    write(tmp_path / "few", ["cat", "dog"], count=1)
    with pytest.raises(
        DataError, match=r"none can be held out: the class 'cat' has one image, .* Add images of that class, or"
    ):
        opened(dataset="folder", root=str(tmp_path / "few")).train_dataloader()
    write(tmp_path / "few", ["cat", "dog", "owl"], count=3)
    with pytest.raises(
        DataError,
        match=r"none can be held out: 0\.1 of 9 images are 1, and both splits need one .* --data\.val_fraction 0\.34\.",
    ):
        opened(dataset="folder", root=str(tmp_path / "few")).train_dataloader()
    assert len(opened(dataset="folder", root=str(tmp_path / "few"), val_fraction=0.34).val_dataloader().dataset) == 4
    probed = opened(dataset="folder", root=str(tmp_path / "few"))  # as probing reads it
    probed.hold_out_each_class()
    assert sorted(int(label) for _, labels in probed.val_dataloader() for label in labels) == [0, 0, 1, 2]
    (tmp_path / "few/ape").mkdir()
    (tmp_path / "few/ape/1.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images of the class ape .*Left out: 1 with suffix \.heic \(1\.heic\)"):
        opened(dataset="folder", root=str(tmp_path / "few")).train_dataloader()


def test_every_readable_ending_is_read_and_the_rest_is_told(tmp_path):
    for name, endings in {"cat": ["png", "JPG", "webp"], "dog": ["tiff", "BMP", "gif"]}.items():
        (tmp_path / name).mkdir()
        for ending in endings:
            Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / name / f"1.{ending}")
    for junk in (".ipynb_checkpoints", ".git", "__MACOSX", "dog/.cache"):
        (tmp_path / junk).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / junk / "1.png")
    (tmp_path / "cat/notes.txt").write_text("")
    data = opened(dataset="folder", root=str(tmp_path), val_fraction=0.4)
    assert data.class_names == ["cat", "dog"]
    assert data.describe("train") == "3 images in 2 classes (cat 1, dog 2)"
    assert data.describe("val") == "3 images in 2 classes (cat 2, dog 1)"
    (line,) = data.left_out()
    assert line == f"{tmp_path}: 4 hidden (.git, .ipynb_checkpoints, ...), 1 with suffix .txt (notes.txt)"


def test_first_folder_is_the_class(tmp_path):
    for folder in ("train/a/day", "train/a/night", "train/b/day", "val/a/day", "val/b/night/2"):
        write(tmp_path, [folder], count=2)
    data = opened(dataset="folder", root=str(tmp_path), batch_size=2)
    assert data.class_names == ["a", "b"]
    assert data.describe("train") == "6 images in 2 classes (a 4, b 2)"
    assert [label for _, labels in data.val_dataloader() for label in labels.tolist()] == [0, 0, 1, 1]


def test_parts_in_any_case_and_a_class_called_train(tmp_path):
    write(tmp_path / "photos/Train", ["cat", "dog"], count=3)
    write(tmp_path / "photos/VAL", ["cat", "dog"], count=2)
    write(tmp_path / "photos", ["extra"])
    (tmp_path / "photos/Test").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos/Test/1.png")
    data = opened(dataset="folder", root=str(tmp_path / "photos"))
    assert data.describe("train") == "6 images in 2 classes (cat 3, dog 3)"
    assert data.describe("val") == "4 images in 2 classes (cat 2, dog 2)"
    assert data.left_out() == [f"{tmp_path}/photos: extra"]
    with pytest.raises(DataError, match=r"The images in .*Test must lie in one sub-folder per class, as in .*Train\."):
        data.describe("test")
    assert data.describe("predict") == "1 images"
    write(tmp_path / "vehicles", ["bus", "train"], count=10)
    assert opened(dataset="folder", root=str(tmp_path / "vehicles")).class_names == ["bus", "train"]


def test_classes_are_numbered_as_by_timm(tmp_path):
    write(tmp_path, ["10b", "2a", "B", "a", "ä", "Zoo1", "zoo10", "zoo2"], count=12)
    data = opened(dataset="folder", root=str(tmp_path))
    reader = timm.data.create_dataset("", root=str(tmp_path), search_split=False).reader
    assert data._part("train").reader.class_to_idx == reader.class_to_idx
    assert data._part("train").reader.samples == reader.samples
    assert re.fullmatch(
        r"86 images in 8 classes \(2a 1\d, 10b 1\d, a .*, B .*, Zoo1 .*, ä 1\d\)", data.describe("train")
    )


def test_many_classes_are_told_by_their_extremes(tmp_path):
    write(tmp_path / "train", [f"c{number}" for number in range(12)], count=2)
    write(tmp_path / "train", ["c5"], count=3)
    write(tmp_path / "val", ["c1"], count=1)
    data = opened(dataset="folder", root=str(tmp_path))
    assert data.describe("train") == "25 images in 12 classes (from 2 of c0 to 3 of c5)"
    assert data.describe("val") == "1 images in 1 classes (from 0 of c0 to 1 of c1)"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_skipped_and_told(tmp_path, num_workers):
    write(tmp_path / "train", ["cat", "dog"], count=4)
    write(tmp_path / "val", ["cat", "dog"], count=2)
    broken = [tmp_path / "train/dog/3.png", tmp_path / "val/cat/1.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    data = opened(dataset="folder", root=str(tmp_path), batch_size=4, num_workers=num_workers)
    # The next image stands in and counts in training, so that batches keep their size; in an evaluation it does not.
    labels = [label for _, labels in data.train_dataloader() for label in labels.tolist()]
    assert sorted(labels) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [label for _, labels in data.val_dataloader() for label in labels.tolist()] == [0, IGNORED, 1, 1]
    assert [why.partition(": ")[0] for why in data.skipped()] == [f"Could not read the image {path}" for path in broken]
    assert data.tests_on_validation


def test_too_many_unreadable_images_are_an_error(tmp_path):
    write(tmp_path / "train", ["cat", "dog"], count=4)
    write(tmp_path / "val", ["cat", "dog"], count=25)
    (tmp_path / "train/dog/0.png").write_bytes(b"")
    for number in range(6):
        (tmp_path / f"val/dog/{number}.png").write_bytes(b"")
    data = opened(dataset="folder", root=str(tmp_path), batch_size=4)
    with pytest.raises(DataError, match=r"6 of the 50 images cannot be read\. The first: .*val/dog/0\.png"):
        list(data.val_dataloader())
    list(data.train_dataloader())
    for number in range(4):
        (tmp_path / f"train/dog/{number}.png").write_bytes(b"")
    data = opened(dataset="folder", root=str(tmp_path), batch_size=4)
    with pytest.raises(DataError, match=r"No image of the class 'dog' can be read\. The first: .*train/dog/\d\.png"):
        list(data.train_dataloader())


def test_a_root_is_never_the_digits(tmp_path):
    write(tmp_path, ["cat", "dog"], count=10)
    assert opened(root=str(tmp_path)).class_names == ["cat", "dog"]
    assert opened().num_classes == 10
    with pytest.raises(ConfigError, match=r"The digits are embedded, but data\.root is .*: set data\.dataset"):
        opened(dataset="digits", root=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1; got 0."),
        ({"num_workers": -1}, "data.num_workers must be at least 0; got -1."),
        ({"image_size": 0}, "data.image_size must be at least 1; got 0."),
        ({"val_fraction": 1.0}, "data.val_fraction must be between 0 and 1; got 1.0."),
        ({"val_fraction": float("nan")}, "data.val_fraction must be between 0 and 1; got nan."),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError) as raised:
        opened(**settings)
    assert str(raised.value) == message


@pytest.mark.parametrize("wrong", [{"std": [0.0, 1.0, 1.0]}, {"std": [-1.0, 1.0, 1.0]}, {"mean": [math.inf, 0.0, 0.0]}])
def test_statistics_that_no_image_has(wrong):
    with pytest.raises(ConfigError, match=r"data.mean must be finite and data.std above 0"):
        opened(**wrong).val_dataloader()


def test_images_without_a_model_need_their_settings():
    with pytest.raises(ConfigError, match=r"image_size, in_chans, mean and std must be given"):
        ClassifyData().setup("fit")


def test_torchvision_set(tmp_path, monkeypatch):
    write(tmp_path, ["cat", "dog"], count=10)
    # `torch/folder` is torchvision's ImageFolder; it stands for the sets that have to be downloaded.
    monkeypatch.setattr("visionattn.data.classify.datamodule._TWO_PARTS", ("torch/folder",))
    data = opened(dataset="torch/folder", root=str(tmp_path), batch_size=4, val_fraction=0.3)
    assert data.num_classes == 2
    assert [len(data._source(part)) for part in ("train", "val")] == [14, 6]
    assert first(data.train_dataloader())[0].shape == (4, 3, 16, 16)


class Reader:
    """Stands for timm's readers of streams: grey images, numbered, eight a part."""

    class_to_idx = None

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return ((Image.new("L", (20, 20), 10 * number), number % 2) for number in range(8))


def test_stream(monkeypatch):
    opened_parts = []

    def create_dataset(name, split, is_training, **_):
        opened_parts.append((name, split, is_training))
        return IterableImageDataset(None, reader=Reader())

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    with pytest.raises(ConfigError, match=r"does not list its classes: set data.num_classes"):
        _ = opened(dataset="wds/made", root="up").num_classes
    opened_parts.clear()
    data = opened(dataset="wds/made", root="up", num_classes=2, batch_size=4, train_split="a", val_split="b")
    data.trainer = type("Trainer", (), {"current_epoch": 5})
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    images, labels = first(loader)
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 1, 0, 1]
    assert loader.dataset.reader.epoch == 5
    data.test_dataloader()
    assert sorted(opened_parts) == [("wds/made", "a", True), ("wds/made", "b", False)]


def test_missing_reader_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"The dataset 'hfds/beans' needs the package 'datasets'"):
        _ = opened(dataset="hfds/beans").num_classes
