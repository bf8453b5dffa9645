"""Map-style datasets of (PIL image, label) over arrays, folders, timm's readers and torchvision datasets.

Each also gives the name of an image, for lists of predictions, and all labels without reading an image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, Subset

from visionattn.data.images import SUFFIXES, Listing, class_folders, eight_bits, list_images, open_image
from visionattn.errors import ConfigError, DataError, MissingPackageError, shorten

__all__ = [
    "ArrayImages",
    "FolderReader",
    "ReaderImages",
    "TorchvisionImages",
    "check_root",
    "first_names",
    "labels_of",
    "name_of",
    "open_named",
    "split_folders",
]


def first_names(names: Sequence[str]) -> str:
    """The first few of many names, such as `cat, dog and 3 more`."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shorten(name, 40) for name in names[:5]) + more


# Names that timm accepts for the sub-folders of the splits.
_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}


def check_root(dataset: str, root: str | None) -> None:
    """Refuse a root that does not fit the dataset.

    Raises:
        ConfigError: It is missing, or the dataset takes none; or the dataset belongs to an earlier version.
        DataError: It does not exist. A single image is accepted for prediction.
    """
    if dataset == "cifar10-sheets":
        raise ConfigError(
            "The dataset 'cifar10-sheets' is no longer supported: use 'torch/cifar10' with torchvision's files in "
            "data.root (data.download gets them), or convert the sheets to a folder of images with "
            "tools/class_folders.py and use 'folder'."
        )
    on_disk = dataset in ("mnist", "folder")
    if root is None:
        if on_disk or dataset.startswith("torch/"):
            raise ConfigError(
                f"The dataset {dataset!r} needs a folder: set data.root, or give it after the recipe, as in "
                "visionattn fit RECIPE FOLDER."
            )
        return
    if dataset == "digits":
        raise ConfigError(
            f"The digits are embedded, but data.root is {shorten(root)}: set data.dataset to the dataset there, such "
            "as folder, or remove data.root."
        )
    if on_disk and not Path(root).is_dir():
        if not Path(root).is_file():
            raise DataError(f"There is no folder {shorten(root)}.")
        if dataset != "folder":
            raise DataError(f"There is no folder {shorten(root)}: it is a file.")


def split_folders(root: str | Path) -> tuple[dict[str, Path | None], list[Path]]:
    """The folder of each split below a root, and other folders next to them.

    Without any split, the root itself is the training folder.
    """
    below = class_folders(root)
    by_name = {name.lower(): folder for name, folder in below.items()}
    found = {part: next((by_name[name] for name in names if name in by_name), None) for part, names in _FOLDERS.items()}
    others = [folder for folder in below.values() if folder not in found.values()]
    # A folder `train` of images next to folders of cars and ships is a class, not a split.
    if not any(found.values()) or (others and found["train"] and not class_folders(found["train"])):
        return {**dict.fromkeys(found), "train": Path(root)}, []
    return found, others


def _natural(text: str) -> list[str | int]:
    """Sort key of timm: numbers by value, case ignored."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


class FolderReader(Reader):
    """Images in one folder per class, with the interface of timm's readers and in the order of timm's folder reader.

    A class is a folder directly below the root, with all of its sub-folders. Classes and files are sorted naturally
    ("2" before "10", case ignored).

    Args:
        root: The folder; without labels, also a single image.
        like: The training folder, which defines the labels; None numbers the classes found.
        labelled: Read classes. Otherwise, as for prediction, every image below the root has label 0.

    Raises:
        DataError: There is no such folder, no image in it, a class without images, or a class that `like` lacks.
    """

    def __init__(self, root: str | Path, like: FolderReader | None = None, labelled: bool = True) -> None:
        super().__init__()
        single = not labelled and Path(root).is_file()
        self.root = str(Path(root).parent if single else root)
        folders = sorted(class_folders(root).items(), key=lambda item: _natural(item[0])) if labelled else []
        found = {name: list_images(folder, recursive=True) for name, folder in folders}
        top = Listing([Path(root)]) if single else list_images(root, recursive=not labelled)
        if found:
            top.left_out.pop("in sub-folders", None)
            for path in top.files:
                top.skip("next to the class folders", path)
        else:
            found[""] = Listing(top.files)
        self.left_out = Listing()
        for listing in (top, *found.values()):
            for reason, paths in listing.left_out.items():
                self.left_out.left_out.setdefault(reason, []).extend(paths)
        self._check(found, like)
        numbered = {name: label for label, name in enumerate(found)}
        self.class_to_idx: dict[str, int] = numbered if like is None else like.class_to_idx
        samples = [(str(path), self.class_to_idx[name]) for name, listing in found.items() for path in listing.files]
        self.samples = sorted(samples, key=lambda sample: _natural(sample[0]))

    def _check(self, found: dict[str, Listing], like: FolderReader | None) -> None:
        empty = [name for name, listing in found.items() if not listing.files]
        hint = f"none that ends in {', '.join(SUFFIXES)}."
        if left_out := self.left_out.describe_left_out():
            hint += f" Left out: {shorten(left_out, 300)}."
        if len(empty) == len(found):
            raise DataError(f"There are no images in {shorten(self.root)}: {hint}")
        if like is None and empty:
            raise DataError(f"There are no images of the class {first_names(empty)} in {shorten(self.root)}: {hint}")
        if like is not None and found.keys() == {""} and "" not in like.class_to_idx:
            raise DataError(
                f"The images in {shorten(self.root)} must lie in one sub-folder per class, as in {shorten(like.root)}."
            )
        if like is not None and (unknown := sorted(set(found) - set(like.class_to_idx))):
            raise DataError(
                f"{shorten(self.root)} has classes that are not in {shorten(like.root)}: {first_names(unknown)}."
            )

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Path and label."""
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


class ArrayImages(Dataset):
    """Images held in memory: uint8 (B, H, W) or (B, H, W, 3), and labels (B,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def name(self, index: int) -> str:
        """Name of an image in a list of predictions."""
        return str(index)


class ReaderImages(Dataset):
    """Images of one of timm's readers.

    Unlike timm's own dataset, which replaces an unreadable image by the next one, this one raises an error.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self.reader[index]
            if isinstance(file, str):
                return eight_bits(open_image(file), file), label
            image = Image.open(file)
            image.load()
        except DataError:
            raise
        except Exception as error:
            # PIL raises almost any exception for damaged files: OSError, SyntaxError, struct.error, ValueError.
            name = self.reader.filename(index, absolute=True)
            raise DataError(f"Could not read the image {shorten(name)}: {shorten(error)}.") from error
        return image, label

    @property
    def labels(self) -> list[int] | None:
        """All labels, without reading an image; None if the reader cannot provide them."""
        return [label for _, label in self.reader.samples] if hasattr(self.reader, "samples") else None

    def name(self, index: int) -> str:
        """Name of an image in a list of predictions."""
        return self.reader.filename(index)


class TorchvisionImages(Dataset):
    """Images of a torchvision dataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"Could not read image {index} of {type(self.dataset).__name__}: {error}.") from error

    @property
    def labels(self) -> list[int] | None:
        """All labels, without reading an image; None if the dataset does not keep them."""
        targets = getattr(self.dataset, "targets", None)
        return None if targets is None else [int(label) for label in targets]

    def name(self, index: int) -> str:
        """Name of an image in a list of predictions."""
        return str(index)


def open_named(given: Any, split: str) -> Any:
    """A split of a dataset that timm reads, as named in the settings of a data module.

    Raises:
        DataError: It cannot be opened.
        MissingPackageError: Its reader needs a package.
    """
    try:
        dataset = timm.data.create_dataset(
            given.dataset,
            root=given.root,
            split=split,
            is_training=split == given.train_split,
            download=given.download,
            batch_size=given.batch_size,
            seed=given.seed,
        )
    except ImportError as error:
        raise MissingPackageError(f"The dataset {given.dataset!r} needs the package {error.name!r}.") from error
    except Exception as error:
        raise DataError(
            f"Could not open the split {split!r} of the dataset {given.dataset!r}: {shorten(error, 300)}"
        ) from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    return ReaderImages(dataset.reader) if hasattr(dataset, "reader") else TorchvisionImages(dataset)


def labels_of(source: Any) -> list[int] | None:
    """Label of each image of a split, which may be a subset of another; None if they are not known."""
    if not isinstance(source, Subset):
        return source.labels
    whole: Any = source.dataset
    return None if whole.labels is None else [whole.labels[index] for index in source.indices]


def name_of(source: Any, index: int) -> str:
    """Name of an image of a split, which may be a subset of another."""
    whole: Any = source.dataset if isinstance(source, Subset) else source
    return whole.name(source.indices[index] if isinstance(source, Subset) else index)
