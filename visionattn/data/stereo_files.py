"""A stereo pair's files: which they are, and reading them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.disparity import read_disparity
from visionattn.data.images import read_rgb
from visionattn.errors import DataError

__all__ = ["Scene", "StereoPair"]

# Factor of 8 bits by the image's height: full, half, third and quarter size of 2003, 2005 and 2006; tsukuba of 2001.
FACTORS = {1500: 1, 750: 2, 375: 4, 1110: 1, 555: 2, 370: 3, 288: 16}


@dataclass(frozen=True)
class StereoPair:
    """A scene's arrays.

    Attributes:
        left: (H, W, 3) of uint8.
        right: Likewise.
        truth: (H, W) of float32, disparity of the left view in pixels, NaN where it is not known.
        nonocc: (H, W) of bool, what the right view sees too; None where the data set does not say.
        right_truth: (H, W), disparity of the right view likewise; None where the data set has none.
    """

    left: np.ndarray
    right: np.ndarray
    truth: np.ndarray
    nonocc: np.ndarray | None
    right_truth: np.ndarray | None = None


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
        factor: Of disparities in 8 bits; None goes by the image's height.
        decode: Reads a file of disparities as (H, W) of float32, NaN where there is none; None goes by the suffix.
    """

    name: str
    left: Path
    right: Path
    truth: Path
    right_truth: Path | None = None
    nonocc: Path | None = None
    factor: float | None = None
    decode: Callable[[Path], np.ndarray] | None = None

    def read(self) -> StereoPair:
        """Read all files.

        Raises:
            DataError: One is damaged, sizes differ, or the factor of 8 bits is not known.
        """
        left, right = read_rgb(self.left), read_rgb(self.right)
        truth, nonocc, right_truth = self._read(self.truth), None, None
        if self.right_truth is not None:
            right_truth = self._read(self.right_truth)
        if self.nonocc is not None:
            with Image.open(self.nonocc) as image:
                numbers = np.asarray(image.convert("L") if image.mode in ("1", "P", "RGB") else image)
            nonocc = numbers > (128 if numbers.dtype == np.uint8 else 0)  # Middlebury has 128 for occluded
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
                raise DataError(f"{path} and {self.left} differ in size: {sizes}.")
        return StereoPair(left, right, truth, nonocc, right_truth)

    def _read(self, path: Path) -> np.ndarray:
        if self.decode is not None:
            return self.decode(path)
        if path.suffix.lower() != ".png":
            return read_disparity(path)
        try:
            with Image.open(path) as image:
                deep, height = image.mode.startswith("I"), image.height
        except OSError as error:
            raise DataError(f"Could not read {path}: {error}.") from error
        factor = 256 if deep else self.factor or FACTORS.get(height)
        if factor is None:
            raise DataError(f"{path} holds disparities in 8 bits times a factor that it does not say: give --factor.")
        return read_disparity(path, factor)


def _consistent(truth: np.ndarray, right_truth: np.ndarray) -> np.ndarray:
    """Where the right view's truth at the match is within a pixel of the left view's."""
    width = truth.shape[1]
    match = np.arange(width) - np.rint(np.nan_to_num(truth)).astype(np.int64)
    found = np.take_along_axis(right_truth, match.clip(0, width - 1), 1)
    return (match >= 0) & (np.abs(truth - found) <= 1)  # NaN is not near anything
