"""The embedded digits: 1,797 grey images of 8 x 8 pixels, 10 classes, inside the scikit-learn wheel.

They are the test split of the UCI dataset "Optical Recognition of Handwritten Digits". The splits are fixed and
stratified by class: 1,077 images for training, 360 for validation, 360 for testing.
"""

from __future__ import annotations

import numpy as np

from visionattn.errors import require

__all__ = ["SPLITS", "load_digits"]

SPLITS = ("train", "val", "test")

_SPLIT_SEED = 0


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split.

    Args:
        split: `"train"`, `"val"` or `"test"`.

    Returns:
        uint8 images (B, 8, 8) and int64 labels (B,).
    """
    datasets = require("sklearn.datasets", "train")
    selection = require("sklearn.model_selection", "train")
    images, labels = datasets.load_digits(return_X_y=True)
    # The file stores grey values 0..16.
    images = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    everything = np.arange(len(labels))
    train, rest = selection.train_test_split(everything, test_size=720, stratify=labels, random_state=_SPLIT_SEED)
    val, test = selection.train_test_split(rest, test_size=360, stratify=labels[rest], random_state=_SPLIT_SEED)
    chosen = dict(zip(SPLITS, (train, val, test)))[split]
    return images[chosen], labels[chosen].astype(np.int64)
