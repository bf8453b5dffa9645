"""MNIST and its relatives (Fashion-MNIST, KMNIST) in their original IDX files, packed with gzip or plain.

An IDX file begins with two zero bytes, a type code (8 = unsigned byte), the number of dimensions, and one big-endian
int32 per dimension; the data follow (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from visionattn.errors import DataError

__all__ = ["SPLITS", "load_mnist", "read_idx"]

SPLITS = ("train", "val", "test")

# The last images of the training files are held out for validation.
_HELD_OUT = 5000


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Raises:
        DataError: The file is missing, is not an IDX file of unsigned bytes, or its size differs from its header.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Could not read the IDX file {path}: {error}.") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}."
        )
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise DataError(f"{path} is truncated: it ends inside its header.")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - start != expected:
        raise DataError(f"{path} must hold {expected} bytes for shape {shape}; it holds {len(data) - start}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(root: Path, name: str) -> Path:
    """The file of that name: compressed or plain, in `root` or in torchvision's sub-folder, with dots or dashes."""
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        for spelling in (name, name.replace("-idx", ".idx")):
            for suffix in ("", ".gz"):
                path = folder / f"{spelling}{suffix}"
                if path.is_file():
                    return path
    raise DataError(f"No file {name} or {name}.gz in {root}.")


def load_mnist(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split.

    Args:
        root: Folder with the four IDX files.
        split: `"train"` (all training images but the last 5,000), `"val"` (those 5,000) or `"test"`.

    Returns:
        uint8 images (B, 28, 28) and int64 labels (B,).
    """
    root, prefix = Path(root), "t10k" if split == "test" else "train"
    images = read_idx(_find(root, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(root, f"{prefix}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{root}: the {prefix} images {images.shape} and labels {labels.shape} differ in number.")
    part = {"train": slice(None, -_HELD_OUT), "val": slice(-_HELD_OUT, None), "test": slice(None)}[split]
    return images[part], labels[part].astype(np.int64)
