"""Image files as a backbone takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.images import eight_bits, open_image
from visionattn.probe.inputs import Part

__all__ = ["ImageFiles", "digest_files", "part_of_files"]


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


def part_of_files(paths: Sequence[Path], root: Path, transform: Callable[[Image.Image], Tensor]) -> Part:
    """Image files as a part of a data set, known by their names, sizes and times."""
    names = [str(path.relative_to(root)) for path in paths]
    return Part(ImageFiles(paths, transform), names, digest_files(paths, root))


def digest_files(paths: Sequence[Path], root: Path) -> str:
    """Hash of the names, sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
