"""What `visionattn probe` works on: the backbone with its weights, and the images that train and test."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from visionattn.checkpoints import create, load, load_weights, read_card
from visionattn.data.samplers import StreamLoader
from visionattn.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    UnknownNameError,
    VisionAttnError,
    shorten,
)
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


def read_model(args: argparse.Namespace) -> tuple[nn.Module, str, str | None]:
    """Give the backbone with its weights, where they come from, and their licence if it is known.

    Raises:
        VisionAttnError: There is no such backbone, or its weights cannot be had; the message says what to give.
    """
    name = args.backbone
    if os.path.exists(name):
        if args.random or args.checkpoint:
            raise InputError(f"{name} is a file with weights: leave out --random and --checkpoint.")
        return load(name), f"file {Path(name).name}", None
    hosted = name.startswith(("hf-hub:", "local-dir:"))  # names of weights rather than of architectures
    try:
        cfg: Any = None if hosted else get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownNameError(f"{shorten(error)} Leave out the part after the dot for the default weights.") from error
    settings = {"img_size": args.image_size} if args.image_size and cfg and cfg.fixed_input_size else {}
    if args.checkpoint:
        if args.random:
            raise InputError("Weights are random or those of a file: leave out --random or --checkpoint.")
        return _from_checkpoint(args.checkpoint, name, settings), f"file {Path(args.checkpoint).name}", None
    if args.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the tokens' cache knows weights by their values
            return create(name, **settings), "random", None
    if cfg and not cfg.has_weights:
        raise CheckpointError(
            f"No weights of {name} are published: give a file by --checkpoint, or --random for untrained ones."
        )
    source = (cfg.hf_hub_id or cfg.url or Path(str(cfg.file)).name) if cfg else "as named"
    try:
        return create(name, pretrained=True, **settings), f"{name}, {source}", cfg.license if cfg else None
    except VisionAttnError:
        raise
    # Fetching weights fails in as many ways as there are servers.
    except Exception as error:
        raise CheckpointError(
            f"The weights of {name} ({source}) could not be read: {shorten(error)} If this machine is offline, give "
            "them by --checkpoint FILE, or --random for untrained ones."
        ) from error


def _from_checkpoint(file: str, name: str, settings: dict[str, Any]) -> nn.Module:
    """Weights of a file without its classifier, of which there may be none or one of other classes.

    What a checkpoint of `visionattn fit` says of its model and images holds.
    """
    card = read_card(file)
    if card is not None and card.name == name.split(".")[0]:
        settings = {**card.model_args, **settings}
    model = create(name, **{**settings, "num_classes": 0})
    load_weights(model, file, drop_classifier=True)
    return model


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
