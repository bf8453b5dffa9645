"""Image files: accepted suffixes, the images of a folder, and opening one safely."""

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
"""Suffixes of image files that every command reads, in upper or lower case."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if _AVIF else ()))
"""PIL names of the accepted formats, whatever the suffix."""
MAX_PIXELS = 2**29
"""The largest image that is decoded; a compressed file of a few bytes can declare any size."""

HANDFUL = 5
"""Number of unreadable images that is tolerated in any dataset, however small."""

_JUNK_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_JUNK_FILES = {"thumbs.db", "desktop.ini"}
# PIL modes for grey values of more than 8 bits.
_DEEP = ("I", "F")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden or made by an operating system or a tool: `.git`, `__MACOSX`, `Thumbs.db`."""
    name = path.name.lower()
    return name.startswith(".") or name in _JUNK_FOLDERS or name in _JUNK_FILES


@dataclass
class Listing:
    """The images of a folder, and its other files.

    Attributes:
        files: The images, sorted by path.
        left_out: Files that are not read, by reason: hidden, other suffixes, not a regular file.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, reason: str, path: Path) -> None:
        """Note a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def describe_left_out(self) -> str:
        """What was left out and why, such as `3 with suffix .heic (a.heic, ...), 1 hidden (.git)`; empty if nothing."""
        parts = []
        for reason, paths in sorted(self.left_out.items()):
            names = ", ".join(shorten(path.name, 40) for path in paths[:2])
            parts.append(f"{len(paths)} {reason} ({names}{', ...' if len(paths) > 2 else ''})")
        return ", ".join(parts)


def list_images(folder: str | Path, recursive: bool = False, suffixes: Collection[str] = SUFFIXES) -> Listing:
    """The images in a folder, and the files that are left out.

    Args:
        folder: The folder. Symbolic links are followed, each real folder once.
        recursive: Look into sub-folders too; otherwise these are left out.
        suffixes: Accepted suffixes, in lower case.

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
            listing.skip(f"with suffix {path.suffix}" if path.suffix else "without a suffix", path)


def class_folders(root: str | Path) -> dict[str, Path]:
    """The folders directly below `root` that are classes, by name in order, without hidden and junk folders.

    Raises:
        DataError: There is no such folder, or it cannot be read.
    """
    try:
        entries = sorted(Path(root).iterdir())
    except OSError as error:
        raise DataError(f"Cannot read the folder {shorten(root)}: {_reason(error)}.") from error
    return {path.name: path for path in entries if path.is_dir() and not is_hidden(path)}


def find_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The images in a folder, sorted by path.

    Raises:
        DataError: The folder does not exist or holds no image.
    """
    listing = list_images(folder, recursive)
    if not listing.files:
        left_out = listing.describe_left_out()
        raise DataError(
            f"There are no images in {shorten(folder)}: none ends in {', '.join(SUFFIXES)}."
            + (f" Left out: {left_out}." if left_out else "")
        )
    return listing.files


def pair_by_name(files: Iterable[Path], folder: str | Path, scale: int) -> list[Path]:
    """The low-resolution image of each high-resolution one, by its name (`bird.png`, or `birdx4.png` as in DIV2K).

    Raises:
        DataError: The folder does not exist, or a low-resolution image is missing.
    """
    low = {path.stem: path for path in find_images(folder)}
    found = {path: low.get(path.stem) or low.get(f"{path.stem}x{scale}") for path in files}
    if missing := [path.name for path, other in found.items() if other is None]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{folder} has no low-resolution images for {', '.join(missing[:3])}{more}.")
    return [path for path in found.values() if path is not None]


def open_image(
    path: str | Path,
    formats: Collection[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    stream: IO[bytes] | None = None,
) -> Image.Image:
    """Open and decode an image file: the first frame of an animation.

    Args:
        path: The file; with `stream`, its name in messages.
        formats: PIL names of the accepted formats.
        max_pixels: Number of pixels of the largest image to decode.
        stream: The bytes of the file, such as a member of an archive; None opens `path`.

    Raises:
        DataError: The file is missing, damaged, in another format, not a regular file, or too large.
    """
    try:
        # Opening a pipe would block until something writes to it.
        if stream is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"Could not read the image {shorten(path)}: it is not a regular file.")
        with warnings.catch_warnings():
            # Suppresses PIL's warnings about large images and damaged metadata; the size is checked below.
            warnings.simplefilter("ignore")
            image = Image.open(path if stream is None else stream, formats=tuple(formats))
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"Could not read the image {shorten(path)}: {width} x {height} pixels exceed the limit of "
                    f"{max_pixels:,}."
                )
            image.load()
    except DataError:
        raise
    except Exception as error:
        # PIL raises almost any exception for damaged files: OSError, SyntaxError, struct.error, ValueError, KeyError.
        raise DataError(f"Could not read the image {shorten(path)}: {_reason(error)}.") from error
    return image


def eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """16-bit grey values scaled to 8 bits, which PIL's own conversion would clip at 255; other images unchanged.

    Args:
        image: The image.
        path: Its name in messages.

    Raises:
        DataError: The pixels have 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / np.float32(257)).astype(np.uint8))
    if image.mode in _DEEP:
        raise DataError(f"The image {shorten(path)} has 32 bits per channel; 8 or 16 bits are required.")
    return image


def check_unreadable(failures: Collection[str], count: int) -> None:
    """Raise an error if more than 10 % of the images, and more than a handful, cannot be read.

    Args:
        failures: One message per unreadable image.
        count: Number of images, readable and unreadable.

    Raises:
        DataError: Too many, or all, cannot be read.
    """
    if len(failures) == count or len(failures) > max(HANDFUL, count / 10):
        how_many = "None" if len(failures) == count else f"{len(failures)}"
        can = "can" if len(failures) == count else "cannot"
        first = next(iter(failures), "there are none.")
        raise DataError(f"{how_many} of the {count} images {can} be read. The first: {first}")


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image as uint8 (H, W, 3): grey is replicated, alpha dropped, the EXIF orientation ignored.

    Raises:
        DataError: The file is damaged or not an image, or holds more than 8 bits per channel.
    """
    image = open_image(path)
    if image.mode.startswith(_DEEP):
        raise DataError(f"The image {shorten(path)} has more than 8 bits per channel; 8 bits are required.")
    return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message repeats the path
        return "it is not an image, or its header is damaged"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shorten(text).rstrip(".")
