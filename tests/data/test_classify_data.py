"""The data module: parts, sizes, augmentation and what timm's readers bring."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

pytest.importorskip("lightning")

from timm.data.dataset import IterableImageDataset

from visionattn.data.classify import ClassifyData
from visionattn.data.samplers import StreamLoader
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
    # Prediction takes them all.
    assert len(data.predict_dataloader().dataset) == 20
    assert list(data.predicted_names())[:2] == ["cat/0.png", "cat/1.png"]


def test_folder_of_photographs_is_cropped_in_the_middle(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / part / name / "1.png")
    data = opened(dataset="folder", root=str(tmp_path), image_size=20, batch_size=1)
    assert first(data.val_dataloader())[0].min() == 1


def test_wrong_folders(tmp_path):
    write(tmp_path / "train", ["cat", "dog"])
    write(tmp_path / "val", ["cat", "dgo"])
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: dgo"):
        opened(dataset="folder", root=str(tmp_path)).val_dataloader()
    write(tmp_path / "other/val", ["cat", "dog"])
    with pytest.raises(DataError, match=r"has no folder 'train', but .*val"):
        _ = opened(dataset="folder", root=str(tmp_path / "other")).num_classes
    write(tmp_path / "few", ["cat", "dog"], count=1)
    with pytest.raises(DataError, match=r"has no validation part, and none can be held out"):
        opened(dataset="folder", root=str(tmp_path / "few")).train_dataloader()


def test_images_without_a_model_need_their_settings():
    with pytest.raises(ConfigError, match=r"image_size, in_chans, mean and std must be given"):
        ClassifyData().setup("fit")


def test_torchvision_set(tmp_path, monkeypatch):
    write(tmp_path, ["cat", "dog"], count=10)
    # `torch/folder` is torchvision's ImageFolder; it stands for the sets that have to be downloaded.
    monkeypatch.setattr("visionattn.data.classify._TWO_PARTS", ("torch/folder",))
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
    with pytest.raises(ConfigError, match=r"does not say its classes: set data.num_classes"):
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
