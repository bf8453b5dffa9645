"""Map-style datasets of (PIL image, label) over arrays, timm's readers and torchvision's datasets.

Each also says the name of an image, which a list of predictions needs, and all labels without reading an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from visionattn.errors import DataError

__all__ = ["ArrayImages", "ReaderImages", "TorchvisionImages"]


class ArrayImages(Dataset):
    """Images held in memory: uint8 (B, H, W) or (B, H, W, 3), and labels (B,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def name(self, index: int) -> str:
        """What a list of predictions calls an image."""
        return str(index)


class ReaderImages(Dataset):
    """Images of one of timm's readers.

    Unlike timm's own dataset, which puts the next image in the place of an unreadable one, this one names the file.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self.reader[index]
            image = Image.open(file)
            image.load()
        except Exception as error:
            # Broken files make PIL raise nearly anything: OSError, SyntaxError, struct.error, ValueError.
            name = self.reader.filename(index, absolute=True)
            raise DataError(f"Could not read the image {name}: {error}.") from error
        return image, label

    @property
    def labels(self) -> list[int]:
        """Every label, without reading an image."""
        return [label for _, label in self.reader.samples]

    def name(self, index: int) -> str:
        """What a list of predictions calls an image."""
        return self.reader.filename(index)


class TorchvisionImages(Dataset):
    """Images of a torchvision dataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    @property
    def labels(self) -> list[int]:
        """Every label, without reading an image."""
        return [int(label) for label in self.dataset.targets]

    def name(self, index: int) -> str:
        """What a list of predictions calls an image."""
        return str(index)
