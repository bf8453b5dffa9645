"""Image files as inputs of a backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.images import eight_bits, find_images, open_image
from visionattn.errors import DataError, shorten
from visionattn.predict.images.picture import size_of
from visionattn.probe.given import to_picture
from visionattn.probe.inputs import Part

__all__ = ["GivenPictures", "ImageFiles", "digest_files", "open_pictures", "part_of_files"]


class ImageFiles(Dataset):
    """Images as normalised tensors, each with the class 0.

    Args:
        paths: The files.
        transform: From a PIL image to a tensor (C, H, W).
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path = self.paths[row]
        return self.transform(eight_bits(open_image(path), path)), 0

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image in its file."""
        return size_of(self.paths[row])


class GivenPictures(Dataset):
    """Images given in Python, as normalised tensors, each with the class 0.

    Args:
        images: PIL images, uint8 arrays or tensors (see `visionattn.probe`).
        transform: From a PIL image or a float tensor to a tensor (C, H, W).
    """

    def __init__(self, images: Sequence[Any], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = [to_picture(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.images[row]), 0

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of an image as it was given."""
        image = self.images[row]
        return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[1], image.shape[2])


def open_pictures(images: Any, transform: Callable[[Any], Tensor]) -> tuple[list[str], ImageFiles | GivenPictures]:
    """Images without labels, and their names.

    Args:
        images: A file, a folder with its sub-folders, a list of these, or a list of images given in Python.
        transform: From a PIL image or a float tensor to a tensor (C, H, W).

    Raises:
        DataError: The file or folder does not exist, or contains no image.
        InputError: An image has another type.
    """
    if isinstance(images, (str, Path)):
        images = [images]
    if not all(isinstance(image, (str, Path)) for image in images):
        return [f"image {number}" for number in range(len(images))], GivenPictures(images, transform)
    names, paths = [], []
    for source in map(Path, images):
        if source.is_dir():
            found = find_images(source, recursive=True)
            names += [str(path.relative_to(source)) if len(images) == 1 else str(path) for path in found]
            paths += found
        elif not source.exists():
            raise DataError(f"There is no file or folder {shorten(source)}.")
        else:
            names.append(str(source))
            paths.append(source)
    if not paths:
        raise DataError("There are no images.")
    return names, ImageFiles(paths, transform)


def part_of_files(paths: Sequence[Path], root: Path, transform: Callable[[Image.Image], Tensor]) -> Part:
    """Image files as a split of a data set, identified by their names, sizes and modification times."""
    names = [str(path.relative_to(root)) for path in paths]
    return Part(ImageFiles(paths, transform), names, digest_files(paths, root))


def digest_files(paths: Sequence[Path], root: Path) -> str:
    """Hash of the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
