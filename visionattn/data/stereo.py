"""Folders of stereo pairs with true disparities, as their data sets lay them out.

| layout | data sets | left, right | truth | seen in both views |
| --- | --- | --- | --- | --- |
| middlebury | Middlebury 2014, 2021 and evaluation 3, ETH3D | im0, im1 | disp0.pfm or disp0GT.pfm | mask0nocc.png |
| middlebury2006 | Middlebury 2005, 2006 | view1, view5 | disp1.png | by disp5.png |
| middlebury2003 | Middlebury 2003 | im2, im6 | disp2.png | by disp6.png |
| kitti2015 | KITTI 2015 | image_2/, image_3/ | disp_occ_0/ | disp_noc_0/ |
| kitti2012 | KITTI 2012 | colored_0/, colored_1/, or image_0/, image_1/ | disp_occ/ | disp_noc/ |
| pairs | one's own | left, right | disp_left | nonocc.png, or by disp_right |

KITTI's files lie in folders by kind, those of the others in a folder for each scene. Where the truth of the right view
says what is seen in both, it is within a pixel of the left view's at the match. PNGs of 8 bits hold the disparity times
a factor that the file does not state: it goes by the height at Middlebury, or is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.disparity import DISPARITY_FILES, read_disparity
from visionattn.data.pictures import SUFFIXES, read_rgb
from visionattn.errors import ConfigError, DataError

__all__ = ["LAYOUTS", "Scene", "StereoPair", "find_scenes"]

# Names without suffix: left, right, truths of the left view, truths of the right view.
SCENE_LAYOUTS = {
    "middlebury": ("im0", "im1", ("disp0", "disp0GT"), ("disp1", "disp1GT"), "mask0nocc"),
    "middlebury2006": ("view1", "view5", ("disp1",), ("disp5",), None),
    "middlebury2003": ("im2", "im6", ("disp2",), ("disp6",), None),
    "pairs": ("left", "right", ("disp_left",), ("disp_right",), "nonocc"),
}
# Folders: left, right, truth, truth of what both views see.
KITTI_LAYOUTS = {
    "kitti2015": [("image_2", "image_3", "disp_occ_0", "disp_noc_0")],
    "kitti2012": [("colored_0", "colored_1", "disp_occ", "disp_noc"), ("image_0", "image_1", "disp_occ", "disp_noc")],
}
LAYOUTS = (*SCENE_LAYOUTS, *KITTI_LAYOUTS)
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
    """

    left: np.ndarray
    right: np.ndarray
    truth: np.ndarray
    nonocc: np.ndarray | None


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
    """

    name: str
    left: Path
    right: Path
    truth: Path
    right_truth: Path | None = None
    nonocc: Path | None = None
    factor: float | None = None

    def read(self) -> StereoPair:
        """Read all files.

        Raises:
            DataError: One is damaged, sizes differ, or the factor of 8 bits is not known.
        """
        left, right = read_rgb(self.left), read_rgb(self.right)
        truth, nonocc = self._read(self.truth), None
        if self.nonocc is not None:
            with Image.open(self.nonocc) as image:
                numbers = np.asarray(image.convert("L") if image.mode in ("1", "P", "RGB") else image)
            nonocc = numbers > (128 if numbers.dtype == np.uint8 else 0)  # Middlebury has 128 for occluded
        elif self.right_truth is not None:
            nonocc = _consistent(truth, self._read(self.right_truth))
        for path, array in ((self.right, right), (self.truth, truth), (self.nonocc, nonocc)):
            if array is not None and array.shape[:2] != left.shape[:2]:
                sizes = " and ".join("{} x {}".format(*one.shape[:2]) for one in (array, left))
                raise DataError(f"{path} and {self.left} differ in size: {sizes}.")
        return StereoPair(left, right, truth, nonocc)

    def _read(self, path: Path) -> np.ndarray:
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


def find_scenes(
    folders: str | Path | Iterable[str | Path], layout: str | None = None, factor: float | None = None
) -> list[Scene]:
    """The scenes with truth in folders, sorted by name in each.

    Args:
        folders: A data set's folder (of KITTI, that of `training` or above it), or that of a scene.
        layout: One of `LAYOUTS`; None finds out.
        factor: By which disparities in 8 bits are larger; None goes by the height as Middlebury's.

    Raises:
        ConfigError: There is no such layout.
        DataError: There is no such folder, or no scene of a layout in it.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"There is no layout {layout!r}. Choose from {', '.join(LAYOUTS)}.")
    scenes = []
    for folder in [Path(folders)] if isinstance(folders, (str, Path)) else map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}.")
        found: list[Scene] = []
        for name in LAYOUTS if layout is None else [layout]:
            found = _kitti(folder, name) if name in KITTI_LAYOUTS else _scenes(folder, name, factor)
            if found:
                break
        else:
            wanted = "any layout" if layout is None else f"the layout {layout}"
            raise DataError(f"{folder} holds no stereo pair with its truth in {wanted} of {', '.join(LAYOUTS)}.")
        scenes += found
    return scenes


def _scenes(folder: Path, layout: str, factor: float | None) -> list[Scene]:
    left, right, truths, right_truths, mask = SCENE_LAYOUTS[layout]
    found = []
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        images = [_file(place, (name,), SUFFIXES) for name in (left, right)]
        truth = _file(place, truths, DISPARITY_FILES)
        if images[0] and images[1] and truth:
            right_truth = _file(place, right_truths, DISPARITY_FILES)
            nonocc = _file(place, (mask,), (".png",)) if mask else None
            found.append(Scene(place.resolve().name, images[0], images[1], truth, right_truth, nonocc, factor))
    return found


def _file(folder: Path, names: Iterable[str], suffixes: Iterable[str]) -> Path | None:
    paths = (folder / f"{name}{suffix}" for name in names for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


def _kitti(folder: Path, layout: str) -> list[Scene]:
    for place in (folder, folder / "training"):
        for folders in KITTI_LAYOUTS[layout]:
            left, right, truth, nonocc = (place / name for name in folders)
            if all(path.is_dir() for path in (left, right, truth)):
                names = sorted(path.name for path in truth.glob("*.png") if (left / path.name).is_file())
                return [
                    Scene(
                        Path(name).stem,
                        left / name,
                        right / name,
                        truth / name,
                        nonocc=nonocc / name if (nonocc / name).is_file() else None,
                    )
                    for name in names
                ]
    return []


def _consistent(truth: np.ndarray, right_truth: np.ndarray) -> np.ndarray:
    """Where the right view's truth at the match is within a pixel of the left view's."""
    width = truth.shape[1]
    match = np.arange(width) - np.rint(np.nan_to_num(truth)).astype(np.int64)
    found = np.take_along_axis(right_truth, match.clip(0, width - 1), 1)
    return (match >= 0) & (np.abs(truth - found) <= 1)  # NaN is not near anything
