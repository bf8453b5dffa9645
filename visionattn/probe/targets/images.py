"""Images with a file of labels, as inputs of the backbone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.data.labels import read_labels
from visionattn.errors import DataError, InputError, shorten
from visionattn.probe.files import part_of_files
from visionattn.probe.given import eval_transform
from visionattn.probe.inputs import Images, image_config
from visionattn.probe.settings import ProbeSettings

__all__ = ["TargetImages", "read_targets"]


@dataclass
class TargetImages(Images):
    """Images and the values to be predicted from them.

    Attributes:
        source: Value of `--data`.
        values: Values for training and for testing, float64 (n, K).
        truth_digest: Hash of the values.
    """

    source: str = ""
    values: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    truth_digest: str = ""

    @property
    def data(self) -> str:
        """Value of `--data`."""
        return self.source


def read_targets(data: Any, settings: ProbeSettings, config: dict[str, Any]) -> TargetImages:
    """Read the labels of a folder's images.

    Args:
        data: A file of labels, or a folder with one.
        settings: Settings of the run.
        config: The model's data configuration, as resolved by timm.

    Raises:
        DataError: The labels cannot be read, or a target has the same value in all training images.
        InputError: `data` is not a folder or file.
    """
    if not isinstance(data, (str, Path)):
        raise InputError(
            f"For {settings.task}, data must be a file of labels or a folder with one; got "
            f"{shorten(type(data).__name__)}."
        )
    found = read_labels(data, settings.task == "multilabel")
    size, mean, std = image_config(settings, config)
    transform = eval_transform(config["input_size"][0], size, mean, std)
    parts = [part_of_files([found.root / file for file in files], found.root, transform) for files in found.files]
    train, test = (torch.from_numpy(values) for values in found.values)
    for name, column in zip(found.names, train.T):
        if settings.task == "regression" and len(column.unique()) < 2:
            raise DataError(f"{shorten(name)} is {column[0]:g} in all training images and cannot be learned.")
    digest = hashlib.sha256(repr(found.names).encode() + train.numpy().tobytes() + test.numpy().tobytes())
    told = [f"{len(train)} training and {len(test)} test images with labels ({found.told})."]
    return TargetImages(
        dataset=f"{found.root.resolve().name} ({settings.task})",
        root=str(found.root),
        train=parts[0],
        test=parts[1],
        classes=found.names,
        size=size,
        mean=mean,
        std=std,
        told=told,
        source=str(data),
        values=(train, test),
        truth_digest=digest.hexdigest(),
    )
