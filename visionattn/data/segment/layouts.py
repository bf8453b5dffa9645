"""Folders of images and their masks: the layouts of PASCAL VOC and ADE20K, and plain ones.

    FOLDER/images/*.jpg                FOLDER/masks/*.png                  a fifth of the pairs is the test split
    FOLDER/train/images, .../masks     FOLDER/val/images, .../masks        or test; also images/train, masks/train
    FOLDER/JPEGImages                  FOLDER/SegmentationClass            ImageSets/Segmentation/{train,val}.txt
    FOLDER/images/training             FOLDER/annotations/training         and validation; 0 means no class

A mask has the name of its image with another suffix. The test split is used for testing, or the validation split if
there is none; all others are for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from visionattn.data.images import find_images, list_images
from visionattn.errors import DataError, shorten
from visionattn.files import read_text

__all__ = ["VOC_CLASSES", "MaskPair", "SegmentationSet", "read_classes", "read_segmentation"]

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
TEST_SHARE = 0.2
_VALIDATION = ("val", "valid", "validation")
_LAYOUTS = (
    "images and masks; train and val, each with images and masks; JPEGImages and SegmentationClass; "
    "images/training and annotations/training"
)


class MaskPair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


class SegmentationSet(NamedTuple):
    """Content of a folder.

    Attributes:
        layout: "pairs", "VOC" or "ADE20K".
        train: Training pairs.
        test: Test pairs.
        classes: Class names; None if the folder has none.
        zero_is_ignored: Whether 0 in the masks means no class.
        told: How the pairs were divided.
    """

    layout: str
    train: list[MaskPair]
    test: list[MaskPair]
    classes: tuple[str, ...] | None
    zero_is_ignored: bool
    told: str


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names, one per line, the first for class 0.

    Raises:
        DataError: The file cannot be read, or does not list at least two unique names.
    """
    names = [line.strip() for line in read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if len(names) < 2 or "" in names:
        wrong = f"line {names.index('') + 1} is empty" if "" in names else f"it has {len(names)} line(s)"
        raise DataError(f"{shorten(path)} must have one class per line, at least two; {wrong}.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{shorten(path)} lists the class {shorten(twice)} more than once.")
    return tuple(names)


def read_segmentation(root: str | Path, classes: str | Path | None = None) -> SegmentationSet:
    """Find the pairs of a folder in one of the layouts (see the module).

    Args:
        root: The folder.
        classes: File of class names; None uses `classes.txt` of the folder, or VOC's names.

    Raises:
        DataError: The folder has none of the layouts, an image has no mask, or a split has no pairs.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"There is no folder {shorten(root)}.")
    readers: list[tuple[str, Callable[[Path], tuple[list[MaskPair], list[MaskPair], str]] | None]] = [
        ("VOC", _read_voc if (root / "SegmentationClass").is_dir() else None),
        ("ADE20K", _read_ade if (root / "annotations" / "training").is_dir() else None),
        ("pairs", _read_parts if _parts(root) else None),
        ("pairs", _read_undivided if (root / "masks").is_dir() else None),
    ]
    layout, reader = next(((name, found) for name, found in readers if found), ("", None))
    if reader is None:
        raise DataError(f"{shorten(root)} must have one of the layouts: {_LAYOUTS}.")
    train, test, told = reader(root)
    for part, pairs in (("training", train), ("test", test)):
        if not pairs:
            raise DataError(f"{shorten(root)} has no {part} images with masks.")
    file = classes or (root / "classes.txt" if (root / "classes.txt").exists() else None)
    names = read_classes(file) if file else VOC_CLASSES if layout == "VOC" else None
    return SegmentationSet(layout, train, test, names, layout == "ADE20K", told)


def _read_voc(root: Path) -> tuple[list[MaskPair], list[MaskPair], str]:
    train, test = (
        _of_list(root / "ImageSets" / "Segmentation" / f"{part}.txt", root / "JPEGImages", root / "SegmentationClass")
        for part in ("train", "val")
    )
    return train, test, "training images: train.txt, test images: val.txt"


def _of_list(file: Path, images: Path, masks: Path) -> list[MaskPair]:
    """The pairs that a file lists."""
    stems = read_text(file).split()
    known = {path.stem: path for path in find_images(images)}
    if missing := [stem for stem in stems if stem not in known]:
        raise DataError(f"{shorten(file)} lists {shorten(missing[0])}, but {shorten(images)} has no such image.")
    return _pair([known[stem] for stem in stems], masks)


def _read_ade(root: Path) -> tuple[list[MaskPair], list[MaskPair], str]:
    train, test = (
        _pair(find_images(root / "images" / part), root / "annotations" / part) for part in ("training", "validation")
    )
    return train, test, "training images: training, test images: validation"


def _parts(root: Path) -> dict[str, tuple[Path, Path]]:
    """Image and mask folders of each split."""
    names = ("train", *_VALIDATION, "test")
    found = {name: (root / name / "images", root / name / "masks") for name in names}
    if not found["train"][1].is_dir():
        found = {name: (root / "images" / name, root / "masks" / name) for name in names}
    found = {name: pair for name, pair in found.items() if pair[1].is_dir()}
    return found if "train" in found else {}


def _read_parts(root: Path) -> tuple[list[MaskPair], list[MaskPair], str]:
    parts = _parts(root)
    tests = next((name for name in ("test", *_VALIDATION) if name in parts), None)
    if tests is None:
        raise DataError(f"{shorten(root)} has a split train, but no split test or val.")
    train = [
        pair for name, (images, masks) in parts.items() if name != tests for pair in _pair(find_images(images), masks)
    ]
    images, masks = parts[tests]
    trains = " and ".join(name for name in parts if name != tests)
    return train, _pair(find_images(images), masks), f"training images: {trains}, test images: {tests}"


def _read_undivided(root: Path) -> tuple[list[MaskPair], list[MaskPair], str]:
    pairs = _pair(find_images(root / "images"), root / "masks")
    order = np.random.default_rng(0).permutation(len(pairs))
    count = max(1, round(TEST_SHARE * len(pairs)))
    tests = set(order[:count].tolist())
    train = [pair for row, pair in enumerate(pairs) if row not in tests]
    return (
        train,
        [pairs[row] for row in sorted(tests)],
        f"test images: {count} of {len(pairs)}, drawn with a fixed seed",
    )


def _pair(images: Sequence[Path], masks: Path) -> list[MaskPair]:
    """Each image with the mask of its name."""
    listed = list_images(masks).files
    known = {path.stem: path for path in listed}
    if len(known) < len(listed):
        stems = [path.stem for path in listed]
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise DataError(f"{shorten(masks)} has several masks named {shorten(twice)}.")
    if missing := [path.name for path in images if path.stem not in known]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(shorten(name, 40) for name in missing[:3])
        raise DataError(f"{shorten(masks)} has no masks for {names}{more}: a mask must have the name of its image.")
    return [MaskPair(path, known[path.stem]) for path in images]
