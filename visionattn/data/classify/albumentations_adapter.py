"""Albumentations as an image transform, seeded per sample.

Albumentations 2.0 uses its own random generators, which ignore the seeds of torch and numpy: all workers of a loader
draw the same augmentations, and runs cannot be repeated. Here every call seeds the pipeline from torch's generator,
which `SeededDataset` seeds for each sample. This costs about 20 us per transform.
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
    """Refuse packages that share the import name but not the licence or the behaviour."""
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
        ConfigError: The file is not a pipeline, or another package is installed under the name albumentations.
        MissingPackageError: albumentations is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"The albumentations pipeline {path} does not exist.")
        _check_distribution()
        # Without this setting, importing the package asks a server for newer versions.
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
                f"The albumentations pipeline returns {getattr(result, 'dtype', type(result))}, not a uint8 image. "
                "Remove Normalize, ToFloat and ToTensorV2 from it: normalisation follows from the model."
            )
        return Image.fromarray(result)
