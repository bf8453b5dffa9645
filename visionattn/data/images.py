"""Image files: which endings are read, which files of a folder are images, and opening one safely."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from visionattn.errors import DataError, shorten

__all__ = [
    "FORMATS",
    "HANDFUL",
    "MAX_PIXELS",
    "SUFFIXES",
    "Listing",
    "check_unreadable",
    "class_folders",
    "eight_bits",
    "find_images",
    "is_hidden",
    "list_images",
    "open_image",
    "pair_by_name",
    "read_rgb",
]

_AVIF = features.check("avif")
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SUFFIXES += (".avif",) if _AVIF else ()
"""The endings of image files that every command reads, in any case of letters."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if _AVIF else ()))
"""PIL's names of the formats that are opened, whatever the ending says."""
MAX_PIXELS = 2**29
"""The largest image that is decoded; a compressed file of a few bytes can state any size."""

HANDFUL = 5
"""Images that may be unreadable in any data set, however small."""

_JUNK_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_JUNK_FILES = {"thumbs.db", "desktop.ini"}
# PIL's names for grey values of more than 8 bits.
_DEEP = ("I", "F")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden or was made by a system or a tool: `.git`, `__MACOSX`, `Thumbs.db`."""
    name = path.name.lower()
    return name.startswith(".") or name in _JUNK_FOLDERS or name in _JUNK_FILES


@dataclass
class Listing:
    """The images of a folder, and what else lies there.

    Attributes:
        files: The images, sorted by their path.
        left_out: What is not read, by reason: hidden folders and files, other endings, what is no regular file.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, reason: str, path: Path) -> None:
        """Note a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def describe_left_out(self) -> str:
        """What was left out and why, such as `3 of ending .heic (a.heic, ...), 1 hidden (.git)`; empty if nothing."""
        parts = []
        for reason, paths in sorted(self.left_out.items()):
            names = ", ".join(shorten(path.name, 40) for path in paths[:2])
            parts.append(f"{len(paths)} {reason} ({names}{', ...' if len(paths) > 2 else ''})")
        return ", ".join(parts)


def list_images(folder: str | Path, recursive: bool = False, suffixes: Collection[str] = SUFFIXES) -> Listing:
    """The images in a folder and what is left out there.

    Args:
        folder: The folder. Symbolic links are followed, each real folder once.
        recursive: Look into sub-folders too; otherwise these are left out.
        suffixes: The endings, in lower case.

    Raises:
        DataError: There is no such folder, or it cannot be read.
    """
    folder = Path(folder)
    listing = Listing()
    _scan(folder, recursive, suffixes, listing, set())
    listing.files.sort()
    return listing


def _scan(folder: Path, recursive: bool, suffixes: Collection[str], listing: Listing, seen: set[str]) -> None:
    try:
        seen.add(os.path.realpath(folder))
        entries = sorted(folder.iterdir())
    except (NotADirectoryError, FileNotFoundError) as error:
        raise DataError(f"There is no folder {shorten(folder)}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the folder {shorten(folder)}: {_reason(error)}.") from error
    for path in entries:
        try:
            mode = path.stat().st_mode
        except OSError:
            listing.skip("unreadable", path)
            continue
        if is_hidden(path):
            listing.skip("hidden", path)
        elif stat.S_ISDIR(mode):
            if not recursive:
                listing.skip("in sub-folders", path)
            elif os.path.realpath(path) not in seen:
                try:
                    _scan(path, recursive, suffixes, listing, seen)
                except DataError:
                    listing.skip("unreadable", path)
        elif not stat.S_ISREG(mode):
            listing.skip("not a regular file", path)
        elif path.suffix.lower() in suffixes:
            listing.files.append(path)
        else:
            listing.skip(f"of ending {path.suffix}" if path.suffix else "without an ending", path)


def class_folders(root: str | Path) -> dict[str, Path]:
    """The folders directly below `root` that stand for classes, by name in order; hidden ones and junk are left out.

    Raises:
        DataError: There is no such folder, or it cannot be read.
    """
    try:
        entries = sorted(Path(root).iterdir())
    except OSError as error:
        raise DataError(f"Cannot read the folder {shorten(root)}: {_reason(error)}.") from error
    return {path.name: path for path in entries if path.is_dir() and not is_hidden(path)}


def find_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The images in a folder, sorted by their path.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    listing = list_images(folder, recursive)
    if not listing.files:
        left_out = listing.describe_left_out()
        raise DataError(
            f"There are no images in {shorten(folder)}: none that ends in {', '.join(SUFFIXES)}."
            + (f" Left out: {left_out}." if left_out else "")
        )
    return listing.files


def pair_by_name(files: Iterable[Path], folder: str | Path, scale: int) -> list[Path]:
    """For each high-resolution image, the low-resolution one of its name (`bird.png`, as in DIV2K `birdx4.png`).

    Raises:
        DataError: There is no such folder, or some lack their low-resolution image.
    """
    low = {path.stem: path for path in find_images(folder)}
    found = {path: low.get(path.stem) or low.get(f"{path.stem}x{scale}") for path in files}
    if missing := [path.name for path, other in found.items() if other is None]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{folder} lacks the low-resolution images of {', '.join(missing[:3])}{more}.")
    return [path for path in found.values() if path is not None]


def open_image(
    path: str | Path,
    formats: Collection[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    stream: IO[bytes] | None = None,
) -> Image.Image:
    """Open and decode an image file: the first frame of an animation.

    Args:
        path: The file; with `stream`, what messages call it.
        formats: PIL's names of the formats to open.
        max_pixels: The largest image to decode.
        stream: Where the bytes of the file are, such as a member of an archive; None opens `path`.

    Raises:
        DataError: The file is missing, damaged, in another format, not a regular file, or too large.
    """
    try:
        # A pipe would wait for its writer for ever.
        if stream is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"Could not read the image {shorten(path)}: it is not a regular file.")
        with warnings.catch_warnings():
            # PIL warns of large images and of damaged metadata; sizes are checked here.
            warnings.simplefilter("ignore")
            image = Image.open(path if stream is None else stream, formats=tuple(formats))
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"Could not read the image {shorten(path)}: {width} x {height} pixels are more than the "
                    f"{max_pixels:,} that are read."
                )
            image.load()
    except DataError:
        raise
    except Exception as error:
        # Broken files make PIL raise nearly anything: OSError, SyntaxError, struct.error, ValueError, KeyError.
        raise DataError(f"Could not read the image {shorten(path)}: {_reason(error)}.") from error
    return image


def eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit grey values scaled to 8 bits, which PIL's own conversion would cut at 255; other images as they are.

    Args:
        image: The image.
        path: What messages call it.

    Raises:
        DataError: The pixels have 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8))
    if image.mode in _DEEP:
        raise DataError(f"The image {shorten(path)} has 32 bits per channel; 8 and 16 bits are read here.")
    return image


def check_unreadable(failures: Collection[str], count: int) -> None:
    """Refuse to go on where more than 10 % of the images, and more than a handful, cannot be read.

    Args:
        failures: A message for each image that could not be read.
        count: Number of images, readable or not.

    Raises:
        DataError: These are too many, or all.
    """
    if len(failures) == count or len(failures) > max(HANDFUL, count / 10):
        how_many = "None" if len(failures) == count else f"{len(failures)}"
        can = "can" if len(failures) == count else "cannot"
        first = next(iter(failures), "there are none.")
        raise DataError(f"{how_many} of the {count} images {can} be read. The first: {first}")


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image as uint8 (H, W, 3): grey is replicated, alpha dropped, and turned photographs stay as stored.

    Raises:
        DataError: The file is damaged or not an image, or holds more than 8 bits per channel.
    """
    image = open_image(path)
    if image.mode.startswith(_DEEP):
        raise DataError(f"The image {shorten(path)} has more than 8 bits per channel; 8-bit images are read here.")
    return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message says the path again
        return "it is not an image, or its beginning is damaged"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shorten(text).rstrip(".")
