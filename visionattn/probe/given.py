"""Images given in Python, as arrays or as datasets of (image, label)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from visionattn.data.classify.transforms import Normalize, fit
from visionattn.errors import DataError, InputError, shorten

__all__ = ["MODES", "GivenImages", "class_names", "eval_transform", "to_picture"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ACCEPTED = "PIL images, uint8 arrays (H, W) or (H, W, C), or tensors (C, H, W) of uint8 or floats"


def eval_transform(
    channels: int, size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image | Tensor], Tensor]:
    """The transform of images from folders; float tensors of the resulting shape are not changed.

    Args:
        channels: Number of channels C of the model's images.
        size: Side of the square to which images are resized and cropped; or the height and width to which whole images
            are resized.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.

    Raises:
        InputError: The model does not take images with 1, 3 or 4 channels, or a tensor has another shape.
    """
    if channels not in MODES:
        raise InputError(f"The model takes {channels} channels; images can have 1, 3 or 4.")
    convert = partial(Image.Image.convert, mode=MODES[channels])
    bicubic = v2.InterpolationMode.BICUBIC
    height, width = (size, size) if isinstance(size, int) else size
    resized = fit((size, size), bicubic) if isinstance(size, int) else [v2.Resize((height, width), bicubic)]
    return partial(_prepare, v2.Compose([convert, *resized, Normalize(mean, std)]), (channels, height, width))


def _prepare(prepare: Callable[[Image.Image], Tensor], shape: tuple[int, ...], image: Image.Image | Tensor) -> Tensor:
    if isinstance(image, Image.Image):
        return prepare(image)
    if tuple(image.shape) != shape:
        raise InputError(f"Float tensors must have shape {shape} for this backbone; got {tuple(image.shape)}.")
    return image.float()


class GivenImages(Dataset):
    """Images and labels, with each image as an input of the backbone.

    Args:
        source: Arrays (images, labels), or a dataset of (image, label).
        transform: From a PIL image or a float tensor to a normalised tensor (C, H, W).
        name: Name of an image in messages, with `{}` for its index.

    Attributes:
        labels: Label of each image; -1 if the image cannot be read.
        names: Name of each image.
        digest: Hash of the images and labels.

    Raises:
        InputError: The source is neither of these, or has images or labels of other types.
    """

    def __init__(self, source: Any, transform: Callable[[Image.Image | Tensor], Tensor], name: str) -> None:
        if isinstance(source, (tuple, list)) and len(source) == 2 and hasattr(source[0], "shape"):
            images, labels = source
            if len(images) != len(labels):
                raise InputError(f"images and labels must have the same length; got {len(images)} and {len(labels)}.")
            source = list(zip(images, labels))
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise InputError(
                "Images must be given as arrays (images, labels), or as a dataset of (image, label); got "
                f"{shorten(type(source).__name__)}."
            )
        self.source, self.transform = source, transform
        self.class_names = getattr(source, "classes", None)
        self.names = [name.format(row) for row in range(len(source))]
        self.labels: list[int] = []
        digest = hashlib.sha256()
        for row in range(len(source)):
            try:
                image, label = self._read(row)
            except (DataError, OSError, SyntaxError) as error:
                self.labels.append(-1)
                digest.update(f"unreadable: {type(error).__name__}".encode())
                continue
            self.labels.append(label)
            pixels = image.cpu().float().numpy() if isinstance(image, Tensor) else np.asarray(image)
            digest.update(f"{label} {pixels.shape} {pixels.dtype}".encode())
            digest.update(np.ascontiguousarray(pixels).tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image, label = self._read(row)
        return self.transform(image), label

    def _read(self, row: int) -> tuple[Image.Image | Tensor, int]:
        pair = self.source[row]
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise InputError(f"A dataset must return (image, label); got {shorten(type(pair).__name__)}.")
        image, label = pair
        if int(label) != label or label < 0:
            raise InputError(f"Labels must be whole numbers from 0; got {shorten(label)}.")
        return to_picture(image), int(label)


def to_picture(image: Any) -> Image.Image | Tensor:
    """Convert an image to a PIL image; float tensors are not changed."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.is_floating_point() and image.ndim == 3:
            return image
        image = image.movedim(0, -1).cpu().numpy() if image.ndim == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        kind = f"{image.shape} of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"Images must be {_ACCEPTED}; got {shorten(kind)}.")
    image = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if image.ndim == 3 and image.shape[2] not in (3, 4):
        raise InputError(f"Images must have 1, 3 or 4 channels; got {image.shape[2]}.")
    return Image.fromarray(image)


def class_names(given: Sequence[GivenImages], num_classes: int | None) -> tuple[str, ...]:
    """Names of the classes: those of the training dataset, otherwise numbers.

    Raises:
        DataError: There is only one class, or a label has no name.
    """
    count = 1 + max((label for one in given for label in one.labels), default=0)
    names = given[0].class_names or range(max(count, num_classes or 0))
    if max(count, num_classes or 0) > len(names):
        raise DataError(f"The images have {max(count, num_classes or 0)} classes, but {len(names)} names.")
    if len(names) < 2:
        raise DataError("The images have only one class; probing requires at least two.")
    return tuple(map(str, names))
