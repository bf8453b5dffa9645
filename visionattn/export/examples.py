"""Real data for the calibration and evaluation of exported files, prepared up to the uint8 images of their inputs.

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
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from visionattn.data.classify.digits import load_digits
from visionattn.data.images import check_unreadable, class_folders, eight_bits, find_images, open_image, read_rgb
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.data.matching.stereo import find_scenes
from visionattn.data.restore.bicubic import crop_to_multiple, downscale
from visionattn.errors import DataError, InputError, require, shorten
from visionattn.export.spec import ExportSpec

__all__ = ["LEAST", "Example", "check_task", "feeds", "load_examples", "match_example"]

LEAST = {"restore": 8, "classify": 8, "stereo": 4}
"""Minimum number of images, or pairs, for a calibration, for each task that has examples."""

_MOST = {"restore": 16, "classify": 256, "stereo": 5}
_SIDE = 512  # of the centre crop of a high-resolution image
_STEREO_SIDE = 768  # to which larger views are resized
_GENERATED = (2, (256, 384), 64.0)  # number of scenes, their size, their largest disparity

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Example:
    """One example.

    Attributes:
        images: One image per input, uint8 (H, W, C).
        truth: Ground truth: high-resolution image (r H, r W, C), class index, or disparity (H, W) with NaN where it is
            not known; None if there is none.
    """

    images: tuple[np.ndarray, ...]
    truth: Any = None


def check_task(spec: ExportSpec) -> None:
    """Raise `InputError` for a file without suitable examples."""
    if spec.task not in LEAST:
        raise InputError(
            f"Variants require a task among {', '.join(map(repr, LEAST))}; {spec.model} has the task {spec.task!r}. "
            "Leave out --int8, --fp16 and --preprocess, and write a file that ends in .onnx."
        )
    if spec.input_size[0] not in (1, 3):
        raise InputError(f"Variants require a model with 1 or 3 channels; {spec.model} takes {spec.input_size[0]}.")


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
    found = _packaged(spec) if folder is None else _from_folder(spec, Path(folder))
    if len(found) < least:
        what = "stereo scenes" if spec.task == "stereo" else "images"
        raise DataError(f"{shorten(folder)} contains {len(found)} {what}; calibration needs at least {least}.")
    return found


def feeds(spec: ExportSpec, example: Example) -> dict[str, np.ndarray]:
    """An example as the file's inputs: a batch of one, or of copies if the file has a fixed batch size."""
    result = {}
    for name, image in zip(spec.input_names, example.images):
        if spec.input_type != "uint8":
            low, high = spec.input_range
            values = image.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
            mean, std = (np.asarray(x, np.float32) for x in (spec.mean or [0.0], spec.std or [1.0]))
            image = np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
        result[name] = np.repeat(image[None], spec.batch or 1, axis=0)
    return result


def _from_folder(spec: ExportSpec, folder: Path) -> list[Example]:
    most = _MOST[spec.task]
    if spec.task == "stereo":
        scenes = find_scenes(folder)
        return _read([partial(_scene, spec, scene) for scene in _spread(scenes, most)])
    if spec.task == "restore":
        return _read([partial(_restore, spec, path) for path in _spread(find_images(folder, recursive=True), most)])
    classes = class_folders(folder)
    names = spec.labels if spec.labels and set(classes) <= set(spec.labels) else list(classes)
    known = len(classes) > 1 and (spec.num_classes in (0, len(names)))
    files = find_images(folder, recursive=True)
    # Only files inside a class folder have a label.
    number = {path: names.index(name) for name, path in classes.items()} if known else {}
    chosen = _spread(files, most)
    return _read(
        [partial(_classify, spec, path, number.get(folder / path.relative_to(folder).parts[0])) for path in chosen]
    )


def _packaged(spec: ExportSpec) -> list[Example]:
    if spec.task == "stereo":
        return [match_example(spec, *pair) for pair in _stereo_pairs()]
    if spec.input_size[0] == 1 and spec.task == "classify":
        images, labels = load_digits("val")
        chosen = _spread(range(len(images)), _MOST["classify"])
        return [
            _classified(spec, Image.fromarray(images[i]), int(labels[i]) if spec.num_classes == 10 else None)
            for i in chosen
        ]
    data = require("skimage.data", "images")
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    quarters = [part for picture in pictures for part in _quarters(picture)]
    if spec.task == "restore":
        return [_restored(spec, picture) for picture in _spread(quarters, _MOST["restore"])]
    return [_classified(spec, Image.fromarray(picture), None) for picture in quarters]


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


def _read(readers: Sequence[Callable[[], _T]]) -> list[_T]:
    found, failures = [], []
    for reader in readers:
        try:
            found.append(reader())
        except DataError as error:
            failures.append(str(error))
    check_unreadable(failures, len(readers))
    return found


def _spread(things: Iterable[_T], most: int) -> list[_T]:
    things = list(things)
    if len(things) <= most:
        return things
    return [things[index] for index in np.linspace(0, len(things) - 1, most).round().astype(int)]


def _picture(path: Path, channels: int) -> Image.Image:
    return eight_bits(open_image(path), path).convert("L" if channels == 1 else "RGB")


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _restore(spec: ExportSpec, path: Path) -> Example:
    return _restored(spec, np.asarray(_picture(path, spec.input_size[0])))


def _restored(spec: ExportSpec, picture: np.ndarray) -> Example:
    scale = spec.scale or 1
    image = Image.fromarray(picture).convert("L" if spec.input_size[0] == 1 else "RGB")
    if not spec.dynamic_size:
        height, width = (scale * side for side in spec.input_size[1:])
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    else:
        image = ImageOps.fit(image, (min(image.width, _SIDE), min(image.height, _SIDE)), centering=(0.5, 0.5))
    truth = crop_to_multiple(_array(image), scale)
    return Example((downscale(truth, scale),), truth)


def _classify(spec: ExportSpec, path: Path, label: int | None) -> Example:
    return _classified(spec, _picture(path, spec.input_size[0]), label)


def _classified(spec: ExportSpec, image: Image.Image, label: int | None) -> Example:
    height, width = spec.input_size[1:]
    method = getattr(Image.Resampling, (spec.interpolation or "bicubic").upper(), Image.Resampling.BICUBIC)
    bleed = (1 - (spec.crop_pct or 1.0)) / 2
    image = image.convert("L" if spec.input_size[0] == 1 else "RGB")
    return Example((_array(ImageOps.fit(image, (width, height), method, bleed)),), label)


def _scene(spec: ExportSpec, scene: Any) -> Example:
    try:
        pair = scene.read()
    except DataError:  # for example, ground truth in PNGs without a stated factor
        return match_example(spec, read_rgb(scene.left), read_rgb(scene.right), None)
    return match_example(spec, pair.left, pair.right, pair.truth)


def match_example(spec: ExportSpec, left: np.ndarray, right: np.ndarray, truth: np.ndarray | None) -> Example:
    """Resize a stereo pair to a size that a file takes; disparities are scaled with the width.

    Args:
        spec: The file's metadata.
        left: uint8 (H, W, 3).
        right: uint8 (H, W, 3).
        truth: Ground-truth disparity of the left view (H, W), NaN where it is not known, or None.
    """
    height, width = left.shape[:2]
    if spec.dynamic_size:
        ratio = min(1.0, _STEREO_SIDE / max(height, width))
        ratio = max(ratio, (spec.size_minimum or 1) / min(height, width))
        size = [round(side * ratio) // spec.size_multiple * spec.size_multiple for side in (height, width)]
    else:
        size = spec.input_size[1:]
    if size != [height, width]:
        views = [Image.fromarray(view).resize((size[1], size[0]), Image.Resampling.BICUBIC) for view in (left, right)]
        left, right = (np.asarray(view) for view in views)
    if truth is not None and truth.shape != left.shape[:2]:
        nearest = F.interpolate(torch.from_numpy(np.ascontiguousarray(truth))[None, None].float(), tuple(size))
        truth = nearest[0, 0].numpy() * (size[1] / width)
    return Example((np.ascontiguousarray(left), np.ascontiguousarray(right)), truth)
