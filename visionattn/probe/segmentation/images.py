"""Images and masks of a segmentation probe, as inputs of the backbone and the heads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from visionattn.data.segment.layouts import MaskPair, SegmentationSet, read_segmentation
from visionattn.data.segment.masks import IGNORE, check_labels, read_mask, resize_mask
from visionattn.errors import DataError, InputError, shorten
from visionattn.probe.files import digest_files, part_of_files
from visionattn.probe.given import eval_transform
from visionattn.probe.inputs import Images
from visionattn.probe.settings import ProbeSettings

__all__ = ["SegmentationImages", "read_pairs"]


@dataclass
class SegmentationImages(Images):
    """Images and masks for training and testing.

    Attributes:
        pairs: Pairs of image and mask for training and for testing, in the order of the images.
        zero_is_ignored: Whether 0 in the masks means no class.
        truth_digest: Hash of the masks.
        height: Height of the images in pixels; `size` is their width.
    """

    pairs: tuple[list[MaskPair], list[MaskPair]] = field(default_factory=lambda: ([], []))
    zero_is_ignored: bool = False
    truth_digest: str = ""
    height: int = 0

    @property
    def data(self) -> str:
        """Value of `--data`."""
        return str(self.root)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """See `Images.image_size`."""
        return self.height, self.size

    @property
    def transform(self) -> str:
        """In words."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resized to {self.height} x {self.size} pixels, mean {mean}, deviation {std}"

    def mask(self, part: int, row: int) -> np.ndarray:
        """The mask of a training image (part 0) or test image (1), as stored in the file: uint8 (H, W)."""
        return read_mask(self.pairs[part][row].mask, self.zero_is_ignored)

    def training_masks(self, size: tuple[int, int], progress: Progress | None = None) -> Tensor:
        """Read all masks, name the classes if they have no names, and return the training masks, uint8 (n, H, W).

        Raises:
            DataError: A mask cannot be read, differs in size from its image, or has a class without a name; or there
                are fewer than two classes.
        """
        bar = progress.add_task("masks", total=sum(map(len, self.pairs))) if progress is not None else None
        found: list[np.ndarray] = []
        present: list[set[int]] = [set(), set()]
        for part, pairs in enumerate(self.pairs):
            for row, pair in enumerate(pairs):
                mask = self.mask(part, row)
                _check_size(pair, mask)
                if self.classes:
                    check_labels(mask, pair.mask, self.classes)
                present[part].update(np.unique(mask).tolist())
                if part == 0:
                    found.append(resize_mask(mask, size))
                if progress is not None and bar is not None:
                    progress.advance(bar)
        if progress is not None and bar is not None:
            progress.remove_task(bar)
        classes = present[0] - {IGNORE}
        if len(classes) < 2:
            binary = " In masks of 0 and 255, replace 255 by 1." if classes == {0} else ""
            raise DataError(
                f"The training masks have {len(classes)} class(es) besides {IGNORE}, which is ignored; two or more are "
                f"required.{binary}"
            )
        if not self.classes:
            self.classes = tuple(map(str, range(max((present[0] | present[1]) - {IGNORE}) + 1)))
        return torch.from_numpy(np.stack(found))


def _check_size(pair: MaskPair, mask: np.ndarray) -> None:
    try:
        with Image.open(pair.image) as image:
            width, height = image.size
    except Exception:  # unreadable images are skipped and listed when the tokens are computed
        return
    if mask.shape != (height, width):
        raise DataError(
            f"The mask {shorten(pair.mask)} has {mask.shape[0]} x {mask.shape[1]} pixels, but its image has "
            f"{height} x {width}."
        )


def read_pairs(data: Any, settings: ProbeSettings, config: dict[str, Any]) -> SegmentationImages:
    """Find the images and masks of a folder.

    Args:
        data: The folder.
        settings: Settings of the run.
        config: The model's data configuration, as resolved by timm.

    Raises:
        DataError: The layout of the folder is not supported, or a class file does not match it.
        InputError: `data` is not a folder, or the model takes other images.
    """
    if not isinstance(data, (str, Path)):
        raise InputError(
            f"For segmentation, data must be a folder of images and masks; got {shorten(type(data).__name__)}."
        )
    root = Path(data)
    found: SegmentationSet = read_segmentation(root, settings.classes)
    size = settings.image_size or config["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = config["mean"], config["std"]
    transform = eval_transform(config["input_size"][0], (height, width), mean, std)
    parts = [part_of_files([pair.image for pair in pairs], root, transform) for pairs in (found.train, found.test)]
    masks = [digest_files([pair.mask for pair in pairs], root) for pairs in (found.train, found.test)]
    told = [f"{len(found.train)} training and {len(found.test)} test images with masks ({found.told})."]
    return SegmentationImages(
        dataset=f"{root.resolve().name} (segmentation)",
        root=str(root),
        train=parts[0],
        test=parts[1],
        classes=found.classes or (),
        size=width,
        mean=mean,
        std=std,
        told=told,
        pairs=(found.train, found.test),
        zero_is_ignored=found.zero_is_ignored,
        truth_digest=hashlib.sha256("".join(masks).encode()).hexdigest(),
        height=height,
    )
