"""Folders of images and masks: which pairs train and test, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from visionattn.data.segment.layouts import VOC_CLASSES, read_classes, read_segmentation
from visionattn.errors import DataError


def image(path, size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def names(pairs):
    return [(pair.image.name, pair.mask.name) for pair in pairs]


def test_plain_folders_are_divided_once(tmp_path):
    for number in range(10):
        image(tmp_path / "images" / f"{number}.jpg")
        image(tmp_path / "masks" / f"{number}.png", mode="L")
    found = read_segmentation(tmp_path)
    assert (found.layout, found.classes, found.zero_is_ignored) == ("pairs", None, False)
    assert (len(found.train), len(found.test)) == (8, 2)
    assert sorted(names(found.train + found.test)) == [(f"{n}.jpg", f"{n}.png") for n in range(10)]
    assert read_segmentation(tmp_path) == found
    assert "2 of 10" in found.told


@pytest.mark.parametrize("form", ["{part}/{kind}", "{kind}/{part}"])
def test_parts(form, tmp_path):
    for part, count in (("train", 2), ("val", 1), ("test", 3)):
        for number in range(count):
            image(tmp_path / form.format(part=part, kind="images") / f"{part}{number}.jpg")
            image(tmp_path / form.format(part=part, kind="masks") / f"{part}{number}.png", mode="L")
    found = read_segmentation(tmp_path)
    assert [name for name, _ in names(found.train)] == ["train0.jpg", "train1.jpg", "val0.jpg"]
    assert [name for name, _ in names(found.test)] == ["test0.jpg", "test1.jpg", "test2.jpg"]


def test_voc(tmp_path):
    for stem in ("2007_01", "2007_02", "2007_03"):
        image(tmp_path / "JPEGImages" / f"{stem}.jpg")
        image(tmp_path / "SegmentationClass" / f"{stem}.png", mode="P")
    image(tmp_path / "JPEGImages" / "2007_04.jpg")  # images without a mask are in no list
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_01\n2007_03\n")
    (lists / "val.txt").write_text("2007_02\n")
    found = read_segmentation(tmp_path)
    assert names(found.train) == [("2007_01.jpg", "2007_01.png"), ("2007_03.jpg", "2007_03.png")]
    assert names(found.test) == [("2007_02.jpg", "2007_02.png")]
    assert found.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    (lists / "val.txt").write_text("2007_09\n")
    with pytest.raises(DataError, match=r"val\.txt lists 2007_09"):
        read_segmentation(tmp_path)
    (lists / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: No such file"):
        read_segmentation(tmp_path)


def test_ade(tmp_path):
    for part in ("training", "validation"):
        image(tmp_path / "images" / part / f"{part}.jpg")
        image(tmp_path / "annotations" / part / f"{part}.png", mode="L")
    found = read_segmentation(tmp_path)
    assert (found.layout, found.zero_is_ignored) == ("ADE20K", True)
    assert names(found.train) == [("training.jpg", "training.png")]
    assert names(found.test) == [("validation.jpg", "validation.png")]


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read_segmentation(tmp_path / "lost")
    with pytest.raises(DataError, match="must have one of the layouts: images and masks; train"):
        read_segmentation(tmp_path)
    for number in range(3):
        image(tmp_path / "images" / f"{number}.jpg")
    image(tmp_path / "masks" / "0.png", mode="L")
    with pytest.raises(DataError, match=r"has no masks for 1\.jpg, 2\.jpg: a mask must have the name of its image"):
        read_segmentation(tmp_path)
    for name in ("1.png", "2.png", "2.tif"):
        image(tmp_path / "masks" / name, mode="L")
    with pytest.raises(DataError, match="several masks named 2"):
        read_segmentation(tmp_path)
    (tmp_path / "masks" / "2.tif").unlink()
    for path in (tmp_path / "images").iterdir():
        if path.stem != "0":
            path.unlink()
    with pytest.raises(DataError, match="no training images"):
        read_segmentation(tmp_path)
    (tmp_path / "train" / "masks").mkdir(parents=True)
    with pytest.raises(DataError, match="no split test or val"):
        read_segmentation(tmp_path)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", r"at least two; it has 0 line"),
        ("sky\n", r"it has 1 line"),
        ("sky\n\nsea\n", "line 2 is empty"),
        ("sky\nsea\nsky\n", "lists the class sky more than once"),
        ("sky\0sea", "NUL"),
    ],
)
def test_class_files(text, wrong, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=wrong):
        read_classes(tmp_path / "classes.txt")


def test_names_of_classes(tmp_path):
    for number in range(5):
        image(tmp_path / "images" / f"{number}.jpg")
        image(tmp_path / "masks" / f"{number}.png", mode="L")
    (tmp_path / "classes.txt").write_bytes("﻿sky\r\ndeep sea\r\n\r\n".encode())
    assert read_segmentation(tmp_path).classes == ("sky", "deep sea")
    (tmp_path / "other.txt").write_text("a\nb\nc")
    assert read_segmentation(tmp_path, tmp_path / "other.txt").classes == ("a", "b", "c")
    assert np.unique(np.asarray(Image.open(tmp_path / "masks" / "0.png"))).tolist() == [0]
