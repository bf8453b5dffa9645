"""What `visionattn probe` works on: the backbone with its weights, and the images that train and test."""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from visionattn.data.samplers import StreamLoader
from visionattn.errors import ConfigError, DataError, InputError, shorten
from visionattn.opening import Opened, open_model
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["Images", "Part", "make_backbone", "read_images", "read_model"]


class Part(NamedTuple):
    """Images that train, or test."""

    dataset: Any  # of (tensor, label)
    names: list[str]
    digest: str  # of what they are


@dataclass
class Images:
    """The data set as the backbone shall see it."""

    train: Part
    test: Part
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    told: list[str] = field(default_factory=list)  # what the splits hold
    left_out: list[str] = field(default_factory=list)  # what lies in folders and is not read

    @property
    def transform(self) -> str:
        """In words."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resized and cropped to {self.size} x {self.size} pixels, mean {mean}, deviation {std}"


def read_model(args: argparse.Namespace) -> Opened:
    """Give the backbone with its weights, where they come from, and their licence if it is known.

    Raises:
        VisionAttnError: There is no such backbone, or its weights cannot be loaded; the message says what to give.
    """
    return open_model(args.backbone, args.checkpoint, args.random, image_size=args.image_size, drop_classifier=True)


def make_backbone(args: argparse.Namespace, model: nn.Module, size: int) -> Backbone:
    """Put the model on its device, and read the layers that were asked for.

    Raises:
        InputError: The device cannot be used, or the model cannot be probed there or at this image size.
    """
    try:
        model = model.to(args.device)
        if torch.device(args.device).type == "meta":
            raise RuntimeError("it holds no values.")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shorten(str(error).partition("\n")[0])
        raise InputError(f"The device {shorten(args.device)} cannot be used: {reason}") from error
    on_gpu = torch.device(args.device).type == "cuda"
    options: dict[str, Any] = {"image_size": size, "autocast": torch.bfloat16 if on_gpu else None}
    if args.layers == "last":
        return Backbone(model, None, **options)
    if args.layers == "all":
        return Backbone(model, range(Backbone(model, None, **options).indices[0] + 1), **options)
    return Backbone(model, args.layers, **options)


def read_images(args: argparse.Namespace, config: dict[str, Any]) -> Images:
    """Give the images that train and test, each as the backbone takes it.

    Args:
        args: Of the command.
        config: The model's data configuration, as timm resolves it.

    Raises:
        ConfigError: The options do not fit the data set.
        DataError: It is a stream, or has not two classes.
    """
    from visionattn.data.classify.datamodule import ClassifyData  # needs Lightning

    size = args.image_size or config["input_size"][1]
    mean, std = config["mean"], config["std"]
    try:
        data = ClassifyData(
            dataset=args.dataset,
            root=args.root,
            num_classes=args.num_classes,
            image_size=size,
            in_chans=config["input_size"][0],
            mean=list(mean),
            std=list(std),
            batch_size=1,  # no image is dropped with an incomplete batch
            train_split=args.train_split,
            val_split=args.val_split,
            test_split=args.test_split,
        )
        data.setup("fit")
        classes = data.class_names or [str(number) for number in range(data.num_classes)]
        if len(classes) != data.num_classes:
            raise ConfigError(f"{args.dataset} has {len(classes)} classes, but --num-classes is {data.num_classes}.")
        if data.num_classes < 2:
            raise DataError(f"{args.dataset} has one class only, and probing tells two or more apart.")
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    except ConfigError as error:
        text = re.sub(r"data\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), str(error))
        raise ConfigError(text) from error
    if any(isinstance(loader, StreamLoader) for loader in loaders):
        raise DataError(
            f"{args.dataset} is a stream, and probing reads images in any order: take a folder, or a reader such as "
            "torch/ or hfds/."
        )
    datasets: list[Any] = [loader.dataset for loader in loaders]
    train, val, test = (_part(dataset) for dataset in datasets)
    told = [f"Training images: {data.describe('train')}.", f"Test images: {data.describe('test')}."]
    if val.digest != test.digest:
        told.insert(1, f"Validation images, which train too: {data.describe('val')}.")
    left_out = [f"Left out of {words}." for words in data.left_out()]
    # A validation part that does not test is more training images; some of all of them are held out to choose.
    if val.digest != test.digest:
        digest = hashlib.sha256((train.digest + val.digest).encode()).hexdigest()
        train = Part(ConcatDataset([train.dataset, val.dataset]), train.names + val.names, digest)
    return Images(train, test, tuple(classes), size, mean, std, told, left_out)


def _part(dataset: Any) -> Part:
    source = dataset.dataset
    whole: Any = source.dataset if isinstance(source, Subset) else source
    rows = source.indices if isinstance(source, Subset) else range(len(source))
    names = [whole.name(row) for row in rows]
    digest = hashlib.sha256(repr(names).encode())
    if hasattr(whole, "images"):
        digest.update(whole.images.tobytes())
    elif hasattr(whole, "reader") and hasattr(whole.reader, "samples"):
        # Pictures that were replaced are others, also under their old names.
        for row in rows:
            file = Path(whole.reader.filename(row, absolute=True))
            if file.is_file():
                digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return Part(dataset, names, digest.hexdigest())
