"""Settings of a probing run: the options of `visionattn probe`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from visionattn.errors import InputError, shorten
from visionattn.probe.heads.banks import HeadSpec, create_head, grid
from visionattn.probe.tokens.interface import Layer

__all__ = ["DTYPES", "HEADS", "LARGEST", "LRS", "SEEDS", "TASKS", "ProbeSettings"]

BATCHES = {"classification": 256, "segmentation": 16, "multilabel": 32, "regression": 32}  # images per step
TASKS = tuple(BATCHES)
LARGEST = 2048  # pixels of an image's side
HEADS = ("cls", "gap", "ep_8", "ep_16", "ep_32")
# For LARS, the range of the paper.
LRS = {"adamw": (0.001, 0.003, 0.01, 0.03, 0.1), "lars": (0.1, 0.3, 1.0)}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "int8"}  # -> names in feature stores
SEEDS = 2**63 - 1


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of `visionattn.probe` and of the command.

    Attributes:
        checkpoint: Weight file, if the backbone is a name; it may lack a classifier.
        random: Random weights, if the backbone is a name.

        task: "classification", "segmentation" of images with masks, or "multilabel" or "regression" of images with a
            file of labels.
        root: Folder of the files of a named dataset, such as "mnist" or "torch/cifar10".
        train_split: Training split, of datasets with named splits.
        val_split: Validation split; also used for testing if there is no test split.
        test_split: Test split.
        num_classes: Number of classes, if the data does not define it.
        classes: File of class names for segmentation, one per line; None: `classes.txt` of the folder.
        image_size: Side of the images in pixels, or height and width for segmentation; None: the model's.
        workers: Loading processes.

        layers: "last", "all", or indices.
        dtype: Type of the stored tokens: "float16", "bfloat16", "float32" or "int8".
        cache: Folder of the stored tokens; None: `features` in the output.
        live: Store no tokens; run the backbone in each pass.

        heads: Poolings; None: "cls", "gap", "ep_8", "ep_16" and "ep_32", or "linear" and "attentive" for segmentation.
        optimizer: "adamw", or "lars" as in the paper.
        lrs: Learning rates; for "lars" they are multiplied by batch size / 256; None: those of `LRS`.
        weight_decays: Weight decays. Each combination of the lists is a head.
        seeds: Seeds of initial weights.
        epochs: Epochs of training (paper: 90).
        batch_size: Images per step (paper: 4096); None: 256, 16 for segmentation, 32 for labels and numbers.
        no_knn: Skip nearest neighbours.
        no_pixels: Skip the baseline of 16 x 16 pixels.
        few_shot: Images per class as whole numbers, or fractions such as 0.01.
        draws: Random few-shot subsets per size.
        device: "auto" (a GPU if available), or a device of PyTorch.
        devices: Number of devices, with one process each.

        output: Folder of the report. None: no report in Python; the command writes to
            runs/probe/BACKBONE-DATASET-HASH.
        overwrite: Replace the report of another run in that folder.
        maps: Test images with attention maps, or predicted masks, in the report.
        export: Pooling whose best head is written with the backbone as ONNX.

    Raises:
        InputError: A value is not accepted.
    """

    checkpoint: str | Path | None = None
    random: bool = False

    task: str = "classification"
    root: str | Path | None = None
    train_split: str = "train"
    val_split: str = "validation"
    test_split: str | None = None
    num_classes: int | None = None
    classes: str | Path | None = None
    image_size: int | tuple[int, int] | None = None
    workers: int = 0

    layers: str | Sequence[int] = "last"
    dtype: str = "float16"
    cache: str | Path | None = None
    live: bool = False

    heads: Sequence[str] | None = None
    optimizer: str = "adamw"
    lrs: Sequence[float] | None = None
    weight_decays: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0,)
    epochs: int = 30
    batch_size: int | None = None
    no_knn: bool = False
    no_pixels: bool = False
    few_shot: Sequence[float] = (1, 5, 10)
    draws: int = 5
    device: str = "auto"
    devices: int = 1

    output: str | Path | None = None
    overwrite: bool = False
    maps: int = 4
    export: str | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                object.__setattr__(self, entry.name, tuple(value))
        _check_task(self)
        for name in ("lrs", "weight_decays"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, values)))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if (
                value is not None
                and not isinstance(value, tuple)
                and not (isinstance(value, int) and low <= value <= high)
            ):
                wanted = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
                raise InputError(f"{name} must be a whole number {wanted}; got {shorten(value)}.")
        for name, choices in (("dtype", tuple(DTYPES)), ("optimizer", tuple(LRS))):
            if getattr(self, name) not in choices:
                names = ", ".join(map(repr, choices))
                raise InputError(f"{name} must be one of {names}; got {shorten(getattr(self, name))!r}.")
        for name, (fits, wanted) in _MEMBERS.items():
            for value in getattr(self, name) or ():
                if not fits(value):
                    raise InputError(f"{name} must be {wanted}; got {shorten(value)}.")
        if not (self.weight_decays and self.seeds):
            raise InputError("weight_decays and seeds must each have at least one number.")
        if isinstance(self.layers, str) and self.layers not in ("last", "all"):
            raise InputError(f"layers must be 'last', 'all' or indices; got {shorten(self.layers)!r}.")
        if self.export and self.heads and self.export not in self.heads:
            raise InputError(
                f"--export {shorten(self.export)} must be one of the heads {shorten(', '.join(self.heads))}."
            )

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rates to try."""
        return tuple(self.lrs or LRS[self.optimizer])

    @property
    def images_a_step(self) -> int:
        """The batch size."""
        return self.batch_size or BATCHES[self.task]

    @property
    def precision(self) -> str:
        """Data type of stored tokens, by its name in feature stores."""
        return DTYPES[self.dtype]

    def specs(self, layers: Sequence[Layer], classes: int) -> tuple[list[HeadSpec], list[str]]:
        """The heads to train, each pooling at each layer that it supports, and notes about skipped combinations.

        Args:
            layers: The backbone's layers that are read.
            classes: Number of classes.

        Raises:
            InputError: A requested pooling supports none of the layers.
        """
        poolings = list(dict.fromkeys(self.heads or HEADS))
        specs: list[HeadSpec] = []
        notes = []
        for pooling in poolings:
            fitting, refused = [], None
            for position, layer in enumerate(layers):
                try:
                    create_head(HeadSpec(pooling), layer, classes)
                    fitting.append(position)
                except InputError as error:
                    refused = error
            if refused is not None:
                if self.heads and not fitting:
                    raise refused
                # Without a class token, this head of the default list is not expected.
                if pooling != "cls" or self.heads:
                    names = [layer.name for position, layer in enumerate(layers) if position not in fitting]
                    notes.append(f"{pooling} was skipped at {', '.join(names)}: {refused}")
            specs += self.grid(pooling, fitting)
        if self.export and self.export not in {spec.pooling for spec in specs}:
            raise InputError(f"--export {self.export} must be one of the heads {', '.join(poolings)} of this backbone.")
        return specs, notes

    def grid(self, pooling: str, positions: list[int]) -> list[HeadSpec]:
        """The heads of a pooling at some layers: every combination of learning rate, weight decay and seed."""
        rates = list(self.learning_rates)
        return grid([pooling], positions, [self.optimizer], rates, list(self.weight_decays), list(self.seeds))

    def command(self, backbone: str, data: str) -> str:
        """The command line with all options, so that changed defaults of a later version have no effect.

        Args:
            backbone: Name or file.
            data: Folder or dataset.
        """
        words = ["visionattn", "probe", backbone, f"--data={data}"]
        known = {"lrs": self.learning_rates, "batch_size": self.images_a_step}
        for entry in fields(self):
            value = known.get(entry.name, getattr(self, entry.name))
            if entry.name == "overwrite" or self.task not in _ONLY.get(entry.name, TASKS) or value is None:
                continue
            if value is False:
                continue
            words.append(f"--{entry.name.replace('_', '-')}")
            if value is not True:
                separator = "x" if entry.name == "image_size" else ","
                # With "=", a value may start with a minus sign.
                words[-1] += "=" + (separator.join(map(str, value)) if isinstance(value, tuple) else str(value))
        return shlex.join(words)


def _check_task(settings: ProbeSettings) -> None:
    """Check that all options apply to the task."""
    task = settings.task
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(map(repr, TASKS))}; got {shorten(task)!r}.")
    if task != "segmentation" and isinstance(settings.image_size, tuple):
        raise InputError(f"image_size must be one whole number for {task}: images are square.")
    size = settings.image_size
    if isinstance(size, tuple) and not (
        len(size) == 2 and all(isinstance(side, int) and 1 <= side <= LARGEST for side in size)
    ):
        raise InputError(f"image_size must be a side, or height and width, from 1 to {LARGEST}; got {shorten(size)}.")
    for entry in fields(settings):
        needed = _ONLY.get(entry.name, TASKS)
        if task not in needed and getattr(settings, entry.name) != entry.default:
            option = f"--{entry.name.replace('_', '-')}"
            raise InputError(f"{option} is an option of the task {' or '.join(needed)}, not of {task}.")


# Options of some tasks only.
_ONLY = dict.fromkeys(
    (
        "root",
        "train_split",
        "val_split",
        "test_split",
        "num_classes",
        "no_knn",
        "few_shot",
        "draws",
        "devices",
        "export",
    ),
    ("classification",),
) | {"classes": ("segmentation",), "optimizer": ("classification", "multilabel", "regression")}
_RANGES = {
    "num_classes": (2, math.inf),
    "image_size": (1, LARGEST),
    "workers": (0, 1024),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "draws": (1, math.inf),
    "devices": (1, math.inf),
    "maps": (0, math.inf),
}
_MEMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lrs": (lambda value: 0 < value < math.inf, "finite numbers above 0"),
    "weight_decays": (lambda value: 0 <= value < math.inf, "finite numbers of at least 0"),
    "seeds": (lambda value: isinstance(value, int) and 0 <= value <= SEEDS, f"whole numbers from 0 to {SEEDS}"),
    "few_shot": (
        lambda value: value >= 1 if isinstance(value, int) else 0 < value <= 1,
        "whole numbers of at least 1, or fractions above 0 and at most 1",
    ),
}
