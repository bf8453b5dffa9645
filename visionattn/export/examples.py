"""Real data for the calibration and evaluation of exported files (`visionattn.export.fitting` fits it to their inputs).

| task | folder | ground truth |
| --- | --- | --- |
| restore | high-resolution images | these; the input is their bicubic downscaling as in MATLAB |
| classify | images, or one folder per class | index of the class, if there are classes |
| stereo | scenes of `visionattn.data.matching.stereo` | disparity of the left view, if it can be read |

Without a folder, examples are photographs from the scikit-image wheel, cut into quarters; for stereo, its stereo pair
and generated scenes; for grey images, scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from visionattn.data.classify.digits import load_digits
from visionattn.data.images import check_unreadable, class_folders, eight_bits, find_images, open_image, read_rgb
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.data.matching.stereo import find_scenes
from visionattn.errors import DataError, InputError, require, shorten
from visionattn.export.fitting import Example, fit_example
from visionattn.export.spec import ExportSpec

__all__ = ["LEAST", "RealData", "check_task", "load_data", "load_examples"]

LEAST = {"restore": 8, "classify": 8, "stereo": 4}
"""Minimum number of images, or pairs, for a calibration, for each task that has examples."""

_MOST = {"restore": 16, "classify": 256, "stereo": 5}
_GENERATED = (2, (256, 384), 64.0)  # number of scenes, their size, their largest disparity

_T = TypeVar("_T")


class _Sample(NamedTuple):
    pictures: tuple[np.ndarray, ...]
    truth: Any = None


@dataclass(frozen=True)
class RealData:
    """Real data for the variants of a file.

    Attributes:
        test: Examples to measure on.
        calibration: Examples for the calibration of int8; none if it was not requested.
    """

    test: list[Example]
    calibration: list[Example]


def check_task(spec: ExportSpec) -> None:
    """Raise `InputError` for a file without suitable examples."""
    if spec.task not in LEAST:
        raise InputError(
            f"Variants require a task among {', '.join(map(repr, LEAST))}; {spec.model} has the task {spec.task!r}. "
            "Leave out --int8, --fp16 and --preprocess, and write a file that ends in .onnx."
        )
    if spec.input_size[0] not in (1, 3):
        raise InputError(f"Variants require a model with 1 or 3 channels; {spec.model} takes {spec.input_size[0]}.")


def load_data(
    spec: ExportSpec, int8: bool | str | Path = False, test_data: str | Path | Sequence[Example] | None = None
) -> RealData:
    """Read the data for variants (arguments: see `visionattn.export.variants.write_variants`).

    Raises:
        InputError: The file's task has no examples.
        DataError: A folder does not exist, or contains too few examples.
        MissingPackageError: The package with the images is not installed.
    """
    check_task(spec)
    folder = None if isinstance(int8, bool) else int8
    calibration = load_examples(spec, folder, LEAST[spec.task]) if int8 else []
    if test_data is None and calibration:
        return RealData(calibration, calibration)
    return RealData(load_examples(spec, test_data), calibration)


def load_examples(spec: ExportSpec, folder: str | Path | Sequence[Example] | None, least: int = 1) -> list[Example]:
    """Read examples; from a large folder, an evenly spaced subset.

    Args:
        spec: The file's metadata.
        folder: Folder of real data, or the examples themselves; None uses images from installed packages.
        least: Minimum number of examples.

    Raises:
        DataError: The folder does not exist, or contains too few examples.
        MissingPackageError: The package with the images is not installed.
    """
    if folder is not None and not isinstance(folder, (str, Path)):
        return list(folder)
    readers = _packaged(spec) if folder is None else _in_folder(spec, Path(folder))
    found, failures = [], []
    for read in readers:
        try:
            found.append(fit_example(spec, *read()))
        except DataError as error:
            failures.append(str(error))
    check_unreadable(failures, len(readers))
    if len(found) < least:
        what = "stereo scenes" if spec.task == "stereo" else "images"
        raise DataError(f"{shorten(folder)} contains {len(found)} {what}; calibration needs at least {least}.")
    return found


def _in_folder(spec: ExportSpec, folder: Path) -> list[Callable[[], _Sample]]:
    """Functions that read the chosen examples of a folder."""
    most = _MOST[spec.task]
    if spec.task == "stereo":
        return [partial(_read_scene, scene) for scene in _spread(find_scenes(folder), most)]
    labels = _labels(spec, folder) if spec.task == "classify" else {}
    mode = "L" if spec.input_size[0] == 1 else "RGB"
    return [
        # Only files inside a class folder have a label.
        partial(_read_picture, path, mode, labels.get(folder / path.relative_to(folder).parts[0]))
        for path in _spread(find_images(folder, recursive=True), most)
    ]


def _labels(spec: ExportSpec, folder: Path) -> dict[Path, int]:
    """The class index of each class folder; empty if the classes are not those of the file."""
    classes = class_folders(folder)
    names = spec.labels if spec.labels and set(classes) <= set(spec.labels) else list(classes)
    known = len(classes) > 1 and (spec.num_classes in (0, len(names)))
    return {path: names.index(name) for name, path in classes.items()} if known else {}


def _read_picture(path: Path, mode: str, label: int | None) -> _Sample:
    return _Sample((np.asarray(eight_bits(open_image(path), path).convert(mode)),), label)


def _read_scene(scene: Any) -> _Sample:
    try:
        pair = scene.read()
    except DataError:  # for example, ground truth in PNGs without a stated factor
        return _Sample((read_rgb(scene.left), read_rgb(scene.right)))
    return _Sample((pair.left, pair.right), pair.truth)


def _packaged(spec: ExportSpec) -> list[Callable[[], _Sample]]:
    """Functions that return the examples from installed packages."""
    if spec.task == "stereo":
        return [partial(_Sample, (left, right), truth) for left, right, truth in _stereo_pairs()]
    if spec.input_size[0] == 1 and spec.task == "classify":
        images, labels = load_digits("val")
        chosen = _spread(range(len(images)), _MOST["classify"])
        return [partial(_Sample, (images[i],), int(labels[i]) if spec.num_classes == 10 else None) for i in chosen]
    data = require("skimage.data", "images")
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    quarters = [part for picture in pictures for part in _quarters(picture)]
    return [partial(_Sample, (picture,)) for picture in _spread(quarters, _MOST.get(spec.task, len(quarters)))]


@cache
def _stereo_pairs() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Left view, right view and disparity; photographs at two sizes, since generated scenes lose less in int8."""
    left, right, truth = require("skimage.data", "images").stereo_motorcycle()
    truth = np.where(np.isfinite(truth), truth, np.nan)
    half_left, half_right = (np.asarray(Image.fromarray(view).reduce(2)) for view in (left, right))
    photographs = [(left, right, truth), (half_left, half_right, truth[::2, ::2] / 2)]
    count, size, largest = _GENERATED
    pairs = GeneratedPairs(count, size, largest)
    generated = [(*pair.views, -pair.fields[0, ..., 0]) for pair in (pairs[index] for index in range(count))]
    return [*photographs, *generated]


def _quarters(picture: np.ndarray) -> list[np.ndarray]:
    height, width = (side // 2 for side in picture.shape[:2])
    return [picture[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]


def _spread(things: Iterable[_T], most: int) -> list[_T]:
    things = list(things)
    if len(things) <= most:
        return things
    return [things[index] for index in np.linspace(0, len(things) - 1, most).round().astype(int)]
