"""Labelled images for classification: the embedded digits, MNIST and CIFAR-10 files, or any of timm's readers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from visionattn.data.classify.digits import load_digits
from visionattn.data.classify.mnist import load_mnist
from visionattn.data.classify.sources import (
    ArrayImages,
    FolderReader,
    ReaderImages,
    check_root,
    first_names,
    labels_of,
    name_of,
    open_named,
    split_folders,
)
from visionattn.data.classify.transforms import AUGMENTATIONS, Normalize, augment, fit
from visionattn.data.module import DataModule, count_classes
from visionattn.data.samplers import BalancedSampler, EpochSampler, ResumableLoader, SeededDataset, StreamLoader
from visionattn.errors import ConfigError, DataError, require, shorten

__all__ = ["ClassifyData"]

_ARRAYS = ("digits", "mnist")
# torchvision datasets that have only a training and a test split; their images are small and used whole.
_TWO_PARTS = tuple(f"torch/{name}" for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"))
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ClassifyData(DataModule):
    """Training, validation, test and prediction images.

    Sizes, channels and normalisation that are not given follow from the model.

    Args:
        dataset: `"digits"` (embedded in scikit-learn), `"mnist"` (IDX files), `"folder"`, or a name
            that timm's `create_dataset` reads: `"torch/..."`, `"hfds/..."`, `"wds/..."`, `"tfds/..."`. A folder has one
            sub-folder per class, inside `train`, `val` and `test` or directly; an image's class is the first
            of these sub-folders on its path. None is `"folder"` if `root` is given, else `"digits"`.
        root: Folder of the files.
        num_classes: Number of classes; None counts them.
        image_size: Side of the square input images of the model.
        in_chans: 1 (grey), 3 (colour) or 4 (colour and alpha); images of another kind are converted.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        augmentation: `"none"`, `"shift"` (a small turn, shift and zoom, no flip: digits), `"crop-flip"` (pad, crop and
            flip: CIFAR), `"imagenet"` (random resized crop, flip, TrivialAugment), or the path of a pipeline saved by
            `albumentations.save` (.json, .yaml).
        batch_size: Images per batch and device.
        num_workers: Loading processes per device; the results do not depend on it.
        train_split: Name of the training split, for readers with named splits (hfds, wds, tfds, some of torch).
        val_split: Name of the validation split, likewise.
        test_split: Name of the test split, likewise; None tests on the validation split.
        val_fraction: Fraction of the training images that is held out, stratified by class, if a folder or torchvision
            dataset has no validation split.
        download: Let torchvision and tfds download.
        seed: Seed of shuffling, augmentation and holding out.
        balanced: Draw each class equally often in training, with repeats; the length of an epoch does not change.
    """

    def __init__(
        self,
        dataset: str | None = None,
        root: str | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        in_chans: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augmentation: str = "none",
        batch_size: int = 128,
        num_workers: int = 0,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        val_fraction: float = 0.1,
        download: bool = False,
        seed: int = 0,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        # The logger rejects names that the hyper-parameters of model and data share.
        self.save_hyperparameters(logger=False)
        dataset = dataset or ("digits" if root is None else "folder")
        self.hparams.dataset = dataset
        self.check_counts(image_size=1, in_chans=1, num_classes=1)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must be between 0 and 1; got {val_fraction}.")
        if augmentation not in AUGMENTATIONS and Path(augmentation).suffix not in (".json", ".yaml", ".yml"):
            raise ConfigError(
                f"data.augmentation must be one of {', '.join(map(repr, AUGMENTATIONS))}, or the path "
                f"of a pipeline saved by albumentations (.json, .yaml); got {augmentation!r}."
            )
        check_root(dataset, root)
        self._own: dict[str, Any] = {}
        self._beside: list[Path] = []

    @cached_property
    def class_names(self) -> list[str] | None:
        """Name of each class, if the dataset has names."""
        if self.hparams.dataset in _ARRAYS:
            return [str(digit) for digit in range(10)]
        source = self._part("train")
        class_to_idx = getattr(getattr(source, "reader", getattr(source, "dataset", None)), "class_to_idx", None)
        return sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else None

    @cached_property
    def num_classes(self) -> int:
        """Number of classes, known before there is a model."""
        if self.hparams.num_classes is not None:
            return self.hparams.num_classes
        names = self.class_names
        if names is None:
            raise ConfigError(f"The dataset {self.hparams.dataset!r} does not list its classes: set data.num_classes.")
        if len(names) < 2:
            raise DataError(
                f"{shorten(self.hparams.root)} has only one class. Put the images of each class in a sub-folder of "
                "its own, or set data.num_classes."
            )
        return len(names)

    def state_dict(self) -> dict[str, Any]:
        """The class names, for the checkpoint."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Name the classes of predictions; refuse a checkpoint with other classes."""
        names = state_dict["class_names"]
        if self.trainer is not None and self.trainer.predicting:
            self.class_names = names
        elif names and self.class_names and names != self.class_names:
            raise DataError(
                f"The checkpoint was trained on the classes {first_names(names)}; the data have "
                f"{first_names(self.class_names)}."
            )

    def setup(self, stage: str) -> None:
        """Take from the model what was not given."""
        given = self.hparams
        model = getattr(getattr(self.trainer, "lightning_module", None), "data_config", None)
        if model is None:
            if None in (given.image_size, given.in_chans, given.mean, given.std):
                raise ConfigError("Without a model, image_size, in_chans, mean and std must be given.")
            model = {"input_size": (given.in_chans, given.image_size, given.image_size)}
        channels, *size = model["input_size"]
        if given.in_chans not in (None, channels):
            raise ConfigError(
                f"The model takes {channels} channels, but data.in_chans is {given.in_chans}. Set model.in_chans to "
                f"{given.in_chans} too, or remove data.in_chans: images are converted to the model's channels."
            )
        if channels not in _MODES:
            raise ConfigError(f"The model takes {channels} channels; images must have 1, 3 or 4.")
        mean, std = given.mean or model["mean"], given.std or model["std"]
        if len(mean) != channels or len(std) != channels:
            raise ConfigError(
                f"The model takes {channels} channels, but data.mean has {len(mean)} values and data.std {len(std)}."
            )
        if not (all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)):
            raise ConfigError(f"data.mean must be finite and data.std above 0; got {list(mean)} and {list(std)}.")
        size = tuple(size) if given.image_size is None else (given.image_size, given.image_size)
        self.image_shape = (channels, *size)
        interpolation = v2.InterpolationMode(model.get("interpolation", "bicubic"))
        convert = partial(Image.Image.convert, mode=_MODES[channels])
        finish = Normalize(mean, std)
        # Photographs get a centre crop, as their models expect; small images are used whole.
        whole = given.dataset in _ARRAYS or given.dataset in _TWO_PARTS
        crop_pct = 1.0 if whole else model.get("crop_pct", 1.0)
        # Stored in the checkpoint as its input configuration.
        self.image_config = {
            "input_size": self.image_shape,
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation.value,
            "crop_pct": crop_pct,
            "crop_mode": "center" if size[0] == size[1] else "squash",
        }
        self._eval_transform = v2.Compose([convert, *fit(size, interpolation, crop_pct), finish])
        self._train_transform = v2.Compose([convert, *augment(given.augmentation, size, interpolation), finish])

    def train_dataloader(self) -> DataLoader:
        """Training batches: shuffled, augmented, complete batches only."""
        loader: Any = self._loader("train")
        if not isinstance(loader, StreamLoader) and len(loader) == 0:
            images, needed = loader.sampler.size, loader.batch_size * loader.sampler.num_replicas
            raise DataError(
                f"The training split has {images} images, fewer than one batch of {needed} on all devices. "
                "Reduce data.batch_size."
            )
        return loader

    def val_dataloader(self) -> DataLoader:
        """Validation images in order, each once."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images in order, each once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Images to predict, in order; a folder without a `test` sub-folder is used whole and needs no classes."""
        source = self._predicted
        if isinstance(source, IterableImageDataset):
            return self._loader("test")
        dataset = self.watch(SeededDataset(source, self._eval_transform, seed=None))
        return ResumableLoader(dataset, batch_size=self.hparams.batch_size, num_workers=self.hparams.num_workers)

    def still_loader(self, split: str, most: int) -> DataLoader:
        """Images of a split with evaluation transforms, at most `most`, drawn once.

        Raises:
            ConfigError: The split is a stream.
        """
        source = self._source(split)
        if self.is_stream(split):
            raise ConfigError(
                f"{self.hparams.dataset!r} is a stream; a frozen backbone cannot be measured on it: set model.report "
                "and model.linear_start to false."
            )
        if len(source) > most:
            source = Subset(source, sorted(np.random.default_rng(0).permutation(len(source))[:most].tolist()))
        dataset = self.watch(SeededDataset(source, self._eval_transform, seed=None))
        return ResumableLoader(dataset, batch_size=self.hparams.batch_size, num_workers=self.hparams.num_workers)

    def training_labels(self) -> list[int]:
        """Label of each training image.

        Raises:
            ConfigError: The dataset provides them only by reading its images.
        """
        source = self._source("train")
        labels = None if isinstance(source, IterableImageDataset) else labels_of(source)
        if labels is None:
            raise ConfigError(
                f"The labels of {self.hparams.dataset!r} are not known before its images are read: remove "
                "data.balanced and model.class_weights."
            )
        return labels

    def is_stream(self, split: str) -> bool:
        """Whether the images of a split can only be read sequentially."""
        return isinstance(self._source(split), IterableImageDataset)

    def picture(self, split: str, index: int) -> Image.Image:
        """An image of a split, as it is stored."""
        return self._source(split)[index][0]

    def image_name(self, split: str, index: int) -> str:
        """Name of an image of a split."""
        return name_of(self._source(split), index)

    def predicted_names(self) -> Iterator[str]:
        """Name of each predicted image, in order."""
        source = self._predicted
        if isinstance(source, IterableImageDataset):
            return map(str, itertools.count())
        return (name_of(source, index) for index in range(len(source)))

    def unpredicted(self) -> set[int]:
        """Indices of the images in `predicted_names` that could not be read."""
        watched: list[Any] = self._watched
        return {index for dataset in watched if dataset.dataset is self._predicted for index in dataset.skipped}

    @cached_property
    def _predicted(self) -> Any:
        if self.hparams.dataset != "folder":
            return self._source("test")
        if Path(self.hparams.root).is_file():
            return ReaderImages(FolderReader(self.hparams.root, labelled=False))
        found = self._folders
        folder = found["test"] or found["val"] or found["train"] or Path(self.hparams.root)
        return ReaderImages(FolderReader(folder, labelled=False))

    def _loader(self, part: str) -> DataLoader:
        """The loader of a split; the training split is shuffled and augmented."""
        given, training, source = self.hparams, part == "train", self._source(part)
        transform = self._train_transform if training else self._eval_transform
        common = {
            "batch_size": given.batch_size,
            "num_workers": given.num_workers,
            "drop_last": training,
            "pin_memory": torch.cuda.is_available(),
        }
        if isinstance(source, IterableImageDataset):
            source.transform = transform
            source.set_loader_cfg(num_workers=given.num_workers)
            return StreamLoader(source, self._current_epoch, given.seed, **common)
        draws = training and given.augmentation != "none"
        dataset = self.watch(SeededDataset(source, transform, given.seed if draws else None, training))
        if training:
            dataset.labels, dataset.class_names = labels_of(source), self.class_names
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if training and given.balanced:
            sampler: EpochSampler = BalancedSampler(dataset, world_size, rank, given.seed, self.training_labels())
        else:
            sampler = EpochSampler(dataset, world_size, rank, training, given.seed)
        return ResumableLoader(
            dataset,
            sampler=sampler,
            persistent_workers=given.num_workers > 0,
            generator=torch.Generator().manual_seed(given.seed),
            **common,
        )

    def _current_epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _source(self, part: str) -> Any:
        """Images of a split; a missing validation split is held out from the training split."""
        if part == "test" and self._part("test") is None:
            return self._source("val")
        if part != "test" and self._part("val") is None:
            return Subset(self._part("train"), self._held_out[part])
        return self._part(part)

    def hold_out_each_class(self) -> None:
        """Raise `val_fraction`, if needed, to the hundredth that holds out at least one image of each class."""
        if self._part("val") is None and (labels := self._part("train").labels) is not None:
            self.hparams.val_fraction = max(self.hparams.val_fraction, _least_fraction(labels))

    @cached_property
    def _held_out(self) -> dict[str, list[int]]:
        """Indices of the training images that are kept, and of those held out."""
        labels = self._part("train").labels
        if labels is None:
            raise DataError(f"No validation split can be held out of {self.hparams.dataset!r}: set data.val_split.")
        share, root = self.hparams.val_fraction, shorten(self.hparams.root)
        sizes = Counter(labels)
        least = min(sizes, key=lambda label: sizes[label])
        held_out = math.ceil(share * len(labels))
        if sizes[least] < 2:
            name = self.class_names[least] if self.class_names else least
            raise DataError(
                f"{root} has no validation split, and none can be held out: the class {name!r} has one image, and both "
                "splits need one of each class. Add images of that class, or use sub-folders 'train' and 'val'."
            )
        if min(held_out, len(labels) - held_out) < len(sizes):
            raise DataError(
                f"{root} has no validation split, and none can be held out: {share:g} of {len(labels)} images are "
                f"{held_out}, and both splits need one of each of the {len(sizes)} classes. Use sub-folders 'train' "
                f"and 'val', or --data.val_fraction {_least_fraction(labels):g}."
            )
        train, val = require("sklearn.model_selection", "train").train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels, random_state=self.hparams.seed
        )
        parts = {"train": sorted(train.tolist()), "val": sorted(val.tolist())}
        for part, other in (("val", "train"), ("train", "val")):  # a fraction of few images can round to none
            for label in sorted(set(sizes) - {labels[row] for row in parts[part]}):
                row = next(row for row in parts[other] if labels[row] == label)
                parts[other].remove(row)
                parts[part] = sorted([*parts[part], row])
        return parts

    @property
    def tests_on_validation(self) -> bool:
        """Whether there is no test split."""
        return self._part("test") is None

    def describe(self, split: str) -> str:
        """Number of images of a split, and of each class."""
        if split == "predict":
            source = self._predicted
            return "a stream" if isinstance(source, IterableImageDataset) else f"{len(source):,} images"
        source = self._source(split)
        if isinstance(source, IterableImageDataset):
            return "a stream"
        labels = labels_of(source)
        return f"{len(source):,} images" if labels is None else count_classes(labels, self.class_names)

    def left_out(self) -> list[str]:
        """Files in the opened folders that are not images."""
        readers = [getattr(part, "reader", None) for part in (*self._own.values(), self.__dict__.get("_predicted"))]
        beside = [f"{self.hparams.root}: {first_names([f.name for f in self._beside])}"] if self._beside else []
        listings = [(reader.root, reader.left_out) for reader in readers if isinstance(reader, FolderReader)]
        return beside + [f"{root}: {listing.describe_left_out()}" for root, listing in listings if listing.left_out]

    def _part(self, part: str) -> Any:
        """The dataset's own split, opened once, or None."""
        if part not in self._own:
            self._own[part] = self._open(part)
        return self._own[part]

    def _open(self, part: str) -> Any:
        name, root = self.hparams.dataset, self.hparams.root
        if name == "digits":
            return ArrayImages(*load_digits(part))
        if name == "mnist":
            return ArrayImages(*load_mnist(root, part))
        if name == "folder":
            return self._open_folder(part)
        if name in _TWO_PARTS:
            return None if part == "val" else open_named(self.hparams, part)
        split = {"train": self.hparams.train_split, "val": self.hparams.val_split, "test": self.hparams.test_split}[
            part
        ]
        return None if split is None else open_named(self.hparams, split)

    @cached_property
    def _folders(self) -> dict[str, Path | None]:
        """The folder of each split."""
        if Path(self.hparams.root).is_file():
            raise DataError(f"There is no folder {shorten(self.hparams.root)}: it is a file.")
        found, self._beside = split_folders(self.hparams.root)
        return found

    def _open_folder(self, part: str) -> ReaderImages | None:
        found = self._folders
        folder = found[part]
        if folder is None:
            if part == "train":
                others = ", ".join(shorten(other) for other in found.values() if other)
                raise DataError(f"{shorten(self.hparams.root)} has no sub-folder 'train', but has {others}.")
            return None
        # Classes are numbered by the training folder, even if this one lacks some.
        like = self._part("train").reader if part != "train" and found["train"] else None
        return ReaderImages(FolderReader(folder, like))


def _least_fraction(labels: Sequence[int]) -> float:
    return math.ceil(100 * len(set(labels)) / len(labels)) / 100
