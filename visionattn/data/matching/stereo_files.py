"""The files of a stereo pair, and reading them."""

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
"""Scale factor of disparities in 16-bit PNGs, unless stated otherwise."""


@dataclass(frozen=True)
class StereoPair:
    """The arrays of a scene.

    Attributes:
        left: Left view, uint8 (H, W, 3).
        right: Right view, uint8 (H, W, 3).
        truth: float32 (H, W), ground-truth disparity of the left view in pixels, NaN where unknown.
        nonocc: bool (H, W), whether the right view sees the pixel too; None if the dataset does not say.
        right_truth: (H, W), ground-truth disparity of the right view; None if the dataset has none.
        notes: Assumptions about the files, as sentences.
    """

    left: np.ndarray
    right: np.ndarray
    truth: np.ndarray
    nonocc: np.ndarray | None
    right_truth: np.ndarray | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """The files of a scene.

    Attributes:
        name: Name in tables.
        left: Left image.
        right: Right image.
        truth: Disparity of the left view.
        right_truth: Disparity of the right view, if there is one.
        nonocc: Image that is 255 at non-occluded pixels, or a disparity that is 0 at all others.
        factor: Scale factor of disparities in PNGs; None uses KITTI's 256 for 16 bits and
            `factors` for 8 bits.
        decode: Reads a disparity file as float32 (H, W), NaN where there is none; None decides by suffix.
        factors: Factor of 8-bit PNGs by image height, if the dataset has fixed sizes; otherwise empty.
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
            DataError: A file is damaged, sizes differ, or the factor of an 8-bit file is unknown.
            InputError: The factor is not a finite number above 0.
        """
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise InputError(f"The factor of {shorten(self.name)} must be a number above 0; got {self.factor}.")
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
        """Assumptions about the values of its PNGs, as sentences, from their headers alone.

        Raises:
            DataError: A header is damaged, or the factor of an 8-bit file is unknown.
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
        """Whether a factor applies to a file; adds a note if one is given but not used."""
        if self.decode is None and path.suffix.lower() == ".png":
            return True
        if self.factor is not None:
            notes[f"{shorten(path.name)} holds disparities in pixels: the factor {self.factor:g} is not used"] = None
        return False

    def _factor(self, path: Path, is_8_bit: bool, height: int, notes: dict[str, None]) -> float:
        """Scale factor of disparities in a PNG; adds a note if it is assumed."""
        if self.factor is not None:
            return self.factor
        if not is_8_bit:
            notes[f"16-bit disparities are divided by {KITTI_FACTOR:g}, as in KITTI"] = None
            return KITTI_FACTOR
        if height not in self.factors:
            raise DataError(
                f"{shorten(path)} holds 8-bit disparities with an unknown scale factor: give --factor F for "
                f"all scenes, or --factor {shorten(self.name, 40)}=F (factor= in Python, data.factor in training)."
            )
        factor = self.factors[height]
        notes[f"8-bit disparities are divided by {factor:g}, as in Middlebury at {height} rows"] = None
        return factor


def check_folder(path: str | Path) -> Path:
    """The folder of a dataset.

    Raises:
        DataError: It does not exist or cannot be read.
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
    """The files anywhere below a folder that match the end of a pattern, such as `left/*.pfm`, without hidden ones.

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
    """Read an image that marks pixels: bool (H, W).

    Args:
        path: The image. Colours are converted to grey, transparency is ignored.
        above: Pixels are marked if their 8-bit grey value exceeds this; Middlebury uses 128 for occluded. With more
            bits it is 0.

    Raises:
        DataError: The file is damaged or not an image.
    """
    image = open_image(path)
    deep = image.mode.startswith(("I", "F"))
    return np.asarray(image) > 0 if deep else np.asarray(image.convert("L")) > above


def _consistent(truth: np.ndarray, right_truth: np.ndarray) -> np.ndarray:
    """Where the right ground truth at the match is within a pixel of the left one."""
    width = truth.shape[1]
    # No match lies beyond the width; larger numbers would overflow the integer.
    match = np.arange(width) - np.rint(np.nan_to_num(truth).clip(-width, width)).astype(np.int64)
    found = np.take_along_axis(right_truth, match.clip(0, width - 1), 1)
    return (match >= 0) & (match < width) & (np.abs(truth - found) <= 1)  # False for NaN
