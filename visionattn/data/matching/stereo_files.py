"""A stereo pair's files: which they are, and reading them."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from visionattn.data.images import is_hidden, open_image, read_rgb
from visionattn.data.matching.disparity import read_disparity, read_png_header
from visionattn.errors import DataError, InputError, shorten

__all__ = ["KITTI_FACTOR", "Scene", "StereoPair", "check_folder", "files_below", "read_mask"]

KITTI_FACTOR = 256.0
"""By which the numbers of a PNG of 16 bits are larger than disparities, where nothing else is said."""


@dataclass(frozen=True)
class StereoPair:
    """A scene's arrays.

    Attributes:
        left: (H, W, 3) of uint8.
        right: Likewise.
        truth: (H, W) of float32, disparity of the left view in pixels, NaN where it is not known.
        nonocc: (H, W) of bool, what the right view sees too; None where the data set does not say.
        right_truth: (H, W), disparity of the right view likewise; None where the data set has none.
        notes: What was assumed of the files, in words.
    """

    left: np.ndarray
    right: np.ndarray
    truth: np.ndarray
    nonocc: np.ndarray | None
    right_truth: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A scene's files.

    Attributes:
        name: As a table calls it.
        left: Image.
        right: Image.
        truth: Disparity of the left view.
        right_truth: Disparity of the right view, where there is one.
        nonocc: Image that is 255 where both views see a pixel, or a disparity that is 0 elsewhere.
        factor: By which the numbers of PNGs are larger than disparities; None takes KITTI's 256 for 16 bits, and for 8
            bits what `factors` has.
        decode: Reads a file of disparities as (H, W) of float32, NaN where there is none; None goes by the suffix.
        factors: Factor of PNGs of 8 bits by the image's height, where the data set has fixed sizes; empty knows none.
    """

    name: str
    left: Path
    right: Path
    truth: Path
    right_truth: Path | None = None
    nonocc: Path | None = None
    factor: float | None = None
    decode: Callable[[Path], np.ndarray] | None = None
    factors: Mapping[int, float] = field(default_factory=dict, hash=False)

    def read(self) -> StereoPair:
        """Read all files.

        Raises:
            DataError: One is damaged, sizes differ, or the factor of 8 bits is not known.
            InputError: The factor is not a finite number above 0.
        """
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise InputError(f"The factor of {shorten(self.name)} is {self.factor}; it must be a number above 0.")
        notes: dict[str, None] = {}
        left, right = read_rgb(self.left), read_rgb(self.right)
        truth, nonocc, right_truth = self._read(self.truth, notes), None, None
        if self.right_truth is not None:
            right_truth = self._read(self.right_truth, notes)
        if self.nonocc is not None:
            nonocc = read_mask(self.nonocc)
        elif right_truth is not None and right_truth.shape == truth.shape:
            nonocc = _consistent(truth, right_truth)
        for path, array in (
            (self.right, right),
            (self.truth, truth),
            (self.nonocc, nonocc),
            (self.right_truth, right_truth),
        ):
            if array is not None and array.shape[:2] != left.shape[:2]:
                sizes = " and ".join("{} x {}".format(*one.shape[:2]) for one in (array, left))
                raise DataError(f"{shorten(path)} and {shorten(self.left)} differ in size: {sizes}.")
        return StereoPair(left, right, truth, nonocc, right_truth, tuple(notes))

    def assumed(self) -> list[str]:
        """What is assumed of the numbers in its PNGs, in words, from their headers alone.

        Raises:
            DataError: A header is damaged, or the factor of 8 bits is not known.
        """
        notes: dict[str, None] = {}
        for path in (self.truth, self.right_truth):
            if path is not None and self._scales(path, notes):
                height, _, bits, _ = read_png_header(path)
                self._factor(path, bits <= 8, height, notes)
        return list(notes)

    def _read(self, path: Path, notes: dict[str, None]) -> np.ndarray:
        if self._scales(path, notes):
            return read_disparity(path, lambda n: self._factor(path, n.dtype == np.uint8, n.shape[0], notes))
        return read_disparity(path) if self.decode is None else self.decode(path)

    def _scales(self, path: Path, notes: dict[str, None]) -> bool:
        """Whether a factor counts for a file; a note where one is given and does not."""
        if self.decode is None and path.suffix.lower() == ".png":
            return True
        if self.factor is not None:
            notes[f"{shorten(path.name)} holds pixels, so that the factor {self.factor:g} is not used"] = None
        return False

    def _factor(self, path: Path, is_8_bit: bool, height: int, notes: dict[str, None]) -> float:
        """By which the numbers of a PNG are larger than disparities; a note where that is assumed."""
        if self.factor is not None:
            return self.factor
        if not is_8_bit:
            notes[f"disparities of 16 bits are divided by {KITTI_FACTOR:g}, as KITTI's are"] = None
            return KITTI_FACTOR
        if height not in self.factors:
            raise DataError(
                f"{shorten(path)} holds disparities in 8 bits times a factor that it does not say: give --factor F for "
                f"all scenes, or --factor {shorten(self.name, 40)}=F (factor= in Python, data.factor in training)."
            )
        factor = self.factors[height]
        notes[f"disparities of 8 bits are divided by {factor:g}, as Middlebury's of {height} rows are"] = None
        return factor


def check_folder(path: str | Path) -> Path:
    """The folder of a data set.

    Raises:
        DataError: There is none, or it cannot be reached.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        is_folder = False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read the folder {shorten(path)}: {reason}.") from error
    if not is_folder:
        raise DataError(f"There is no folder {shorten(path)}.")
    return Path(path)


def files_below(folder: Path, pattern: str) -> list[Path]:
    """The files anywhere below a folder that end as the pattern does, such as `left/*.pfm`, without hidden ones.

    Raises:
        DataError: A folder below cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"Cannot read the folder {shorten(error.filename)}: {error.strerror}.") from error

    found = []
    if folder.is_dir():
        for root, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not is_hidden(Path(name))]
            found += [path for name in names if (path := Path(root, name)).match(pattern) and not is_hidden(path)]
    return sorted(found)


def read_mask(path: str | Path, above: int = 128) -> np.ndarray:
    """Read an image that marks pixels: (H, W) of bool.

    Args:
        path: The image. Colours become grey, transparency counts for nothing.
        above: The largest grey value of 8 bits that marks nothing; Middlebury has 128 for occluded. With more bits it
            is 0.

    Raises:
        DataError: The file is damaged or not an image.
    """
    image = open_image(path)
    deep = image.mode.startswith(("I", "F"))
    return np.asarray(image) > 0 if deep else np.asarray(image.convert("L")) > above


def _consistent(truth: np.ndarray, right_truth: np.ndarray) -> np.ndarray:
    """Where the right view's truth at the match is within a pixel of the left view's."""
    width = truth.shape[1]
    # Beyond the width there is no match; larger numbers would not fit an integer.
    match = np.arange(width) - np.rint(np.nan_to_num(truth).clip(-width, width)).astype(np.int64)
    found = np.take_along_axis(right_truth, match.clip(0, width - 1), 1)
    return (match >= 0) & (match < width) & (np.abs(truth - found) <= 1)  # NaN is not near anything
