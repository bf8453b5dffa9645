"""The training and test images of `visionattn probe`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Subset

from visionattn.data.module import count_classes
from visionattn.data.samplers import StreamLoader
from visionattn.errors import ConfigError, DataError, InputError, shorten
from visionattn.probe.given import GivenImages, class_names, eval_transform
from visionattn.probe.settings import ProbeSettings

__all__ = ["Images", "Part", "image_config", "read_images"]

NAMED = ("digits", "mnist", "cifar10-sheets", "folder")
READERS = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")


class Part(NamedTuple):
    """Images of one split."""

    dataset: Any  # of (tensor, label)
    names: list[str]
    digest: str  # hash of the images


@dataclass
class Images:
    """The data set as input of the backbone."""

    dataset: str  # its name; "folder" for a folder
    root: str | None
    train: Part
    test: Part
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    told: list[str] = field(default_factory=list)  # description of the splits
    left_out: list[str] = field(default_factory=list)  # contents of folders that are not read

    @property
    def data(self) -> str:
        """Value of `--data`."""
        return self.root if self.dataset == "folder" and self.root else self.dataset

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the images, or their height and width if whole images are resized to it."""
        return self.size

    @property
    def transform(self) -> str:
        """In words."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resized and cropped to {self.size} x {self.size} pixels, mean {mean}, deviation {std}"


def read_images(data: Any, settings: ProbeSettings, config: dict[str, Any]) -> Images:
    """Return the training and test images as inputs of the backbone.

    Args:
        data: Folder, name of a dataset, or the training and the test images (see `visionattn.probe`).
        settings: Settings of the run.
        config: The model's data configuration, as resolved by timm.

    Raises:
        ConfigError: The options do not match the dataset.
        DataError: The dataset is a stream, or has fewer than two classes.
        InputError: `data` is none of these.
    """
    if isinstance(data, (str, Path)):
        return _read_named(str(data), settings, config)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(
            "data must be a folder, the name of a dataset, or the training and the test images (train, test); got "
            f"{shorten(type(data).__name__)}."
        )
    if settings.root is not None:
        raise InputError("root applies to named datasets only: remove it, or give the name of a dataset.")
    size, mean, std = image_config(settings, config)
    transform = eval_transform(config["input_size"][0], size, mean, std)
    given = [GivenImages(one, transform, f"{what} {{}}") for one, what in zip(data, ("training image", "test image"))]
    names = class_names(given, settings.num_classes)
    train, test = (Part(one, one.names, one.digest) for one in given)
    told = [f"{what} images: {count_classes(one.labels, names)}." for one, what in zip(given, ("Training", "Test"))]
    return Images("images given in Python", None, train, test, names, size, mean, std, told)


def image_config(settings: ProbeSettings, config: dict[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and standard deviation of the images."""
    if isinstance(settings.image_size, tuple):
        raise InputError("image_size must be one whole number for this task: images are square.")
    return settings.image_size or config["input_size"][1], config["mean"], config["std"]


def _read_named(name: str, settings: ProbeSettings, config: dict[str, Any]) -> Images:
    """Images of a folder or a named dataset."""
    from visionattn.data.classify.datamodule import ClassifyData  # needs Lightning

    if not name:
        raise InputError("--data must name a folder or a dataset, such as digits; got ''.")
    size, mean, std = image_config(settings, config)
    dataset, root = name, None if settings.root is None else str(settings.root)
    if root is None and not (name in NAMED or name.startswith(READERS)):
        dataset, root = "folder", name
    try:
        data = ClassifyData(
            dataset=dataset,
            root=root,
            num_classes=settings.num_classes,
            image_size=size,
            in_chans=config["input_size"][0],
            mean=list(mean),
            std=list(std),
            batch_size=1,  # no image is dropped with an incomplete batch
            train_split=settings.train_split,
            val_split=settings.val_split,
            test_split=settings.test_split,
        )
        data.setup("fit")
        data.hold_out_each_class()
        classes = data.class_names or [str(number) for number in range(data.num_classes)]
        if len(classes) != data.num_classes:
            raise ConfigError(f"{dataset} has {len(classes)} classes, but --num-classes is {data.num_classes}.")
        if data.num_classes < 2:
            raise DataError(f"{dataset} has only one class; probing requires at least two.")
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    except ConfigError as error:
        text = str(error).replace("data.dataset", "--data")
        text = re.sub(r"data\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), text)
        raise ConfigError(text) from error
    if any(isinstance(loader, StreamLoader) for loader in loaders):
        raise DataError(
            f"{dataset} is a stream, but probing reads images in random order: use a folder, or a reader such as "
            "torch/ or hfds/."
        )
    train, val, test = (_part(loader.dataset) for loader in loaders)
    told = [f"Training images: {data.describe('train')}.", f"Test images: {data.describe('test')}."]
    if val.digest != test.digest:
        told.insert(1, f"Validation images, also used for training: {data.describe('val')}.")
    left_out = [f"Left out of {words}." for words in data.left_out()]
    # A validation split that is not used for testing adds training images; some of all of them are held out.
    if val.digest != test.digest:
        digest = hashlib.sha256((train.digest + val.digest).encode()).hexdigest()
        train = Part(ConcatDataset([train.dataset, val.dataset]), train.names + val.names, digest)
    return Images(dataset, root, train, test, tuple(classes), size, mean, std, told, left_out)


def _part(dataset: Any) -> Part:
    source = dataset.dataset
    whole: Any = source.dataset if isinstance(source, Subset) else source
    rows = source.indices if isinstance(source, Subset) else range(len(source))
    names = [whole.name(row) for row in rows]
    digest = hashlib.sha256(repr(names).encode())
    if hasattr(whole, "images"):
        digest.update(whole.images.tobytes())
    elif hasattr(whole, "reader") and hasattr(whole.reader, "samples"):
        # Images that were replaced have another digest, even under their old names.
        for row in rows:
            file = Path(whole.reader.filename(row, absolute=True))
            if file.is_file():
                digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return Part(dataset, names, digest.hexdigest())
