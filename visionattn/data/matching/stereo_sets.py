"""Large stereo datasets with parallel folder trees: SceneFlow, FSD, Booster and Spring.

| layout | dataset | left, right | ground truth |
| --- | --- | --- | --- |
| sceneflow | SceneFlow | frames_*pass/.../left/N.png, right/ | disparity/.../left/N.pfm, right/ |
| fsd | FSD | left/rgb/N.jpg, right/rgb/ | left/disparity/N.png |
| booster | Booster | camera_00/im*.png, camera_02/ | disp_00.npy, disp_02.npy |
| spring | Spring | frame_left/frame_left_N.png, frame_right/ | disp1_left/*_N.dsp5, disp1_right/ |

Negative right disparities of SceneFlow change sign. FSD's PNGs hold thousandths of a pixel as three digits in
base 255. Booster's images of a scene differ in lighting, 0 is no value, and mask_00.png marks non-occluded
pixels. Spring's ground truth has twice the images' size; the upper left pixel of each four is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from visionattn.data.images import MAX_PIXELS, SUFFIXES, open_image
from visionattn.data.matching.disparity import read_disparity
from visionattn.data.matching.stereo_files import Scene, files_below
from visionattn.errors import DataError, MissingPackageError, VisionAttnError, shorten

__all__ = ["SET_LAYOUTS"]


def _sceneflow(folder: Path) -> Iterator[Scene]:
    for images in sorted(folder.glob("frames_*pass*")):
        truths = folder / "disparity"
        for truth in files_below(truths, "left/*.pfm"):
            place = truth.relative_to(truths).with_suffix("")
            right_place = place.parent.parent / "right" / place.name
            left, right = _image(images / place), _image(images / right_place)
            if left and right:
                right_truth = truths / right_place.with_suffix(".pfm")
                name = f"{images.name}/{place.parent.parent}/{place.name}"
                yield Scene(name, left, right, truth, right_truth if right_truth.is_file() else None, decode=_absolute)


def _fsd(folder: Path) -> Iterator[Scene]:
    for truth in files_below(folder, "left/disparity/*.png"):
        views = [_image(truth.parents[2] / side / "rgb" / truth.stem) for side in ("left", "right")]
        if views[0] and views[1]:
            name = str((truth.parents[2] / truth.stem).relative_to(folder))
            yield Scene(name, views[0], views[1], truth, decode=_three_digits)


def _booster(folder: Path) -> Iterator[Scene]:
    for truth in files_below(folder, "disp_00.npy"):
        place = truth.parent
        right_truth, mask = place / "disp_02.npy", place / "mask_00.png"
        for left in sorted((place / "camera_00").glob("im*.png")):
            right = place / "camera_02" / left.name
            if right.is_file():
                yield Scene(
                    f"{place.name}/{left.stem}",
                    left,
                    right,
                    truth,
                    right_truth if right_truth.is_file() else None,
                    mask if mask.is_file() else None,
                    decode=_without_zeros,
                )


def _spring(folder: Path) -> Iterator[Scene]:
    for truth in files_below(folder, "disp1_left/disp1_left_*.dsp5"):
        place, number = truth.parent.parent, truth.stem.rsplit("_", 1)[1]
        views = [_image(place / f"frame_{side}" / f"frame_{side}_{number}") for side in ("left", "right")]
        if views[0] and views[1]:
            right_truth = place / "disp1_right" / f"disp1_right_{number}.dsp5"
            yield Scene(
                f"{place.name}/{number}",
                views[0],
                views[1],
                truth,
                right_truth if right_truth.is_file() else None,
                decode=_every_second,
            )


SET_LAYOUTS: dict[str, Callable[[Path], Iterator[Scene]]] = {
    "sceneflow": _sceneflow,
    "fsd": _fsd,
    "booster": _booster,
    "spring": _spring,
}


def _image(path: Path) -> Path | None:
    """The image of that name without suffix."""
    paths = (path.with_name(path.name + suffix) for suffix in SUFFIXES)
    return next((found for found in paths if found.is_file()), None)


def _absolute(path: Path) -> np.ndarray:
    return np.abs(read_disparity(path))


def _without_zeros(path: Path) -> np.ndarray:
    values = read_disparity(path)
    return np.where(values > 0, values, np.float32(np.nan))


def _three_digits(path: Path) -> np.ndarray:
    image = open_image(path, ["PNG"])
    if image.mode not in ("RGB", "RGBA"):
        raise DataError(f"{shorten(path)} is not a PNG with three channels, as in FSD.")
    digits = np.asarray(image.convert("RGB"), np.float32)
    values = digits @ np.array([255 * 255, 255, 1], np.float32) / 1000
    return np.where(values > 0, values, np.float32(np.nan))


def _every_second(path: Path) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise MissingPackageError(f"{shorten(path)} is an HDF5 file, which needs h5py: pip install h5py.") from error
    try:
        with h5py.File(path) as file:
            stored = file["disparity"]
            if len(stored.shape) != 2 or stored.dtype.kind not in "fiu" or stored.size > 4 * MAX_PIXELS:
                raise DataError(f"{shorten(path)} must hold a disparity (H, W); it has {stored.dtype} {stored.shape}.")
            with np.errstate(over="ignore"):
                values = stored[::2, ::2].astype(np.float32)
    except VisionAttnError:
        raise
    except Exception as error:
        # h5py raises almost any exception for damaged files, and for a group instead of an array.
        raise DataError(f"Could not read {shorten(path)}: {shorten(error).rstrip('.')}.") from error
    return np.where(np.isfinite(values), values, np.float32(np.nan))
