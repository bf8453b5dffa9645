"""CIFAR-10 in lossless sheets: 1,000 images of 32 x 32 pixels tiled 25 x 40 in a WebP image.

Folder: `train_00.webp`, `train_01.webp`, ... (1,000 training images each, in the original order), `labels.npz` with the
array `train`, and `test_jpeg.zip` with all 10,000 test images as `CLASS/NNNN.jpg`. The test images passed through JPEG,
the training images did not: a test accuracy measured here is not quite the usual one, and is to be reported as such.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.errors import DataError

__all__ = ["CLASSES", "SPLITS", "load_cifar10_sheets"]

SPLITS = ("train", "val", "test")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _read_sheet(path: Path) -> np.ndarray:
    """One sheet as (1000, 32, 32, 3)."""
    try:
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
    except OSError as error:
        raise DataError(f"Could not read the image sheet {path}: {error}.") from error
    if pixels.shape != (800, 1280, 3):
        raise DataError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels; a sheet has 1280 x 800.")
    return pixels.reshape(25, 32, 40, 32, 3).swapaxes(1, 2).reshape(1000, 32, 32, 3)


def _read_test(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The zipped test images, ordered by class and number."""
    images, labels = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.lower().endswith(".jpg")):
                folder = Path(name).parent.name
                if folder not in CLASSES:
                    raise DataError(f"{path}: {name} is not in a folder named after a class ({', '.join(CLASSES)}).")
                with archive.open(name) as file, Image.open(file) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(CLASSES.index(folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"Could not read the test images {path}: {error}.") from error
    if not images:
        raise DataError(f"{path} holds no CLASS/NNNN.jpg images.")
    return np.stack(images), np.array(labels)


def load_cifar10_sheets(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one part.

    Args:
        root: Folder with the sheets.
        split: `"train"` (all training sheets but the last), `"val"` (the last training sheet: validating on test images
            would choose the checkpoint on the test set) or `"test"` (the zipped JPEG images).

    Returns:
        uint8 images (B, 32, 32, 3) and int64 labels (B,).
    """
    root = Path(root)
    if split == "test":
        images, labels = _read_test(root / "test_jpeg.zip")
        return images, labels.astype(np.int64)
    sheets = sorted(root.glob("train_*.webp"))
    if len(sheets) < 2:
        raise DataError(f"{root} holds {len(sheets)} sheets train_NN.webp; at least two are needed.")
    sheets = sheets[-1:] if split == "val" else sheets[:-1]
    try:
        with np.load(root / "labels.npz") as arrays:
            labels = arrays["train"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"Could not read the array 'train' of {root / 'labels.npz'}: {error}.") from error
    numbers = [int(sheet.stem.removeprefix("train_")) for sheet in sheets]
    labels = np.concatenate([labels[1000 * n : 1000 * (n + 1)] for n in numbers])
    return np.concatenate([_read_sheet(sheet) for sheet in sheets]), labels.astype(np.int64)
