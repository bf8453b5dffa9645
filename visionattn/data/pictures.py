"""Folders of pictures: finding the files, and reading one as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.errors import DataError

__all__ = ["SUFFIXES", "find_pictures", "pair_by_name", "read_rgb"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# PIL's names for grey values of more than 8 bits.
_DEEP = ("I", "F")


def find_pictures(folder: str | Path) -> list[Path]:
    """The pictures that lie directly in a folder, sorted by name.

    Raises:
        DataError: There is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"There are no pictures in {folder}: none that ends in {', '.join(SUFFIXES)}.")
    return files


def pair_by_name(files: Iterable[Path], folder: str | Path, scale: int) -> list[Path]:
    """For each large picture, the small one of its name (`bird.png`, or as in DIV2K `birdx4.png`) in a folder.

    Raises:
        DataError: There is no such folder, or some lack their small picture.
    """
    small = {path.stem: path for path in find_pictures(folder)}
    found = {path: small.get(path.stem) or small.get(f"{path.stem}x{scale}") for path in files}
    if missing := [path.name for path, other in found.items() if other is None]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{folder} lacks the small pictures of {', '.join(missing[:3])}{more}.")
    return [path for path in found.values() if path is not None]


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3): grey is replicated, alpha dropped, and turned photographs stay as stored.

    Raises:
        DataError: The file is damaged or no picture, or holds more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_DEEP):
                raise DataError(f"The picture {path} has more than 8 bits a channel; 8-bit pictures are read here.")
            return np.array(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:
        # Broken files make PIL raise nearly anything: OSError, SyntaxError, struct.error, ValueError.
        raise DataError(f"Could not read the picture {path}: {error}.") from error
