"""Albumentations as an image transform, seeded per sample.

Albumentations 2.0 draws from generators of its own that know nothing of torch's or numpy's seeds: workers of one loader
all make the same augmentations, and runs cannot be repeated. Here every call seeds the pipeline from torch's generator,
which `SeededDataset` seeds for each sample. That costs about 20 us a transform.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visionattn.errors import ConfigError, MissingPackageError, require

__all__ = ["AlbumentationsTransform"]


def _check_distribution() -> None:
    """Refuse what shares the import name but neither the licence nor the behaviour."""
    try:
        importlib.metadata.version("albumentationsx")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise ConfigError(
            "The package albumentationsx (AGPL) is installed under the name albumentations; visionattn works with "
            "albumentations 2.0 (MIT). Run: pip uninstall albumentationsx && pip install 'visionattn[albumentations]'"
        )
    try:
        version = importlib.metadata.version("albumentations")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            "This needs the package albumentations. Install it with: pip install 'visionattn[albumentations]'"
        ) from error
    if not version.startswith("2.0."):
        raise ConfigError(
            f"albumentations {version} is installed; its pipelines are seeded differently from those of 2.0. "
            "Install it with: pip install 'visionattn[albumentations]'"
        )


class AlbumentationsTransform:
    """A pipeline saved by `albumentations.save`, PIL image in, PIL image out.

    The pipeline holds augmentation only; resizing, scaling and normalising follow from the model.

    Args:
        path: The pipeline, .json or .yaml.

    Raises:
        ConfigError: The file is no pipeline, or another package poses as albumentations.
        MissingPackageError: albumentations is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"There is no albumentations pipeline {path}.")
        _check_distribution()
        # Importing it asks a server for newer versions otherwise.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        albumentations = require("albumentations", "albumentations")
        try:
            self.pipeline = albumentations.load(path, data_format="json" if path.suffix == ".json" else "yaml")
        except Exception as error:
            raise ConfigError(f"{path} is not a pipeline saved by albumentations.save: {error}") from error

    def __call__(self, image: Image.Image) -> Image.Image:
        self.pipeline.set_random_seed(int(torch.randint(2**31, ())))
        result = self.pipeline(image=np.asarray(image))["image"]
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8:
            raise ConfigError(
                f"The albumentations pipeline gives {getattr(result, 'dtype', type(result))}, not a uint8 image. Leave "
                "Normalize, ToFloat and ToTensorV2 out of it: normalisation follows from the model."
            )
        return Image.fromarray(result)
