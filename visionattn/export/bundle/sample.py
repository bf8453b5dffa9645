"""The sample of a bundle: one or two images, and PyTorch's result for them with the runner's preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.errors import InputError
from visionattn.export.examples import load_examples
from visionattn.export.spec import ExportSpec
from visionattn_runtime import Model, Pair, RunError

__all__ = ["check_sample", "compute_expected", "draw_result", "sample_images", "write_images"]

TASKS = ("classify", "flow", "multilabel", "regress", "restore", "retrieve", "segment", "stereo")
SCENE = (256, 384)
DIGIT = "a digit of scikit-learn's set (Optical Recognition of Handwritten Digits, UCI, CC BY 4.0)"
PORTRAIT = "a part of the portrait of the astronaut Eileen Collins (NASA, public domain), from scikit-image"


def check_sample(spec: ExportSpec) -> None:
    """Raise `InputError` for a model whose task or number of channels has no sample image."""
    if spec.task not in TASKS or spec.input_size[0] not in (1, 3):
        raise InputError(
            f"A bundle needs a sample image, which is available for 1 or 3 channels and the tasks "
            f"{', '.join(map(repr, TASKS))}; {spec.model} has the task {spec.task!r} and {spec.input_size[0]} "
            "channels. Write a file with --output instead."
        )


def sample_images(spec: ExportSpec) -> tuple[list[np.ndarray], str]:
    """Choose images that a file takes.

    Returns:
        One uint8 image (H, W, C) per input, and their origin, for the card.

    Raises:
        InputError: There are no images for the task or the number of channels.
        MissingPackageError: The package with the images is not installed.
    """
    check_sample(spec)
    if spec.task in ("stereo", "flow"):
        size = SCENE if spec.dynamic_size else (spec.input_size[1], spec.input_size[2])
        views = np.asarray(GeneratedPairs(1, size, size[0] / 8)[0].views)
        return list(views), "a generated scene (visionattn.data.matching.scenes)"
    image = load_examples(spec, None)[0].images[0]
    return [image], DIGIT if spec.input_size[0] == 1 and spec.task == "classify" else PORTRAIT


def write_images(images: list[np.ndarray], spec: ExportSpec, folder: Path) -> list[str]:
    """Write the images as PNG, and as PPM or PGM for the code samples that cannot decode PNG.

    Returns:
        The names of the PNG files.
    """
    names = [f"{name}.png" for name in (spec.input_names if len(images) > 1 else ["input"])]
    for name, pixels in zip(names, images):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        image.save(folder / name)
        image.save((folder / name).with_suffix(".pgm" if pixels.shape[2] == 1 else ".ppm"))
    return names


@torch.no_grad()
def compute_expected(network: nn.Module, file: Model | Pair, images: list[Path]) -> np.ndarray:
    """The result of the runner with PyTorch in place of ONNX Runtime.

    Args:
        network: The model that was exported.
        file: Its float32 file in the runner, of which only pre- and postprocessing are used.
        images: The sample.

    Raises:
        InputError: The network does not accept them.
    """
    model: Any = network

    def run(*arrays: np.ndarray) -> Tensor:
        return model(*map(torch.from_numpy, arrays))

    def of(file: Model, compute: Any) -> Any:
        return lambda feeds: compute(*(feeds[name] for name in file.spec["input_names"])).float().numpy()

    # Instance attributes override the methods of the class.
    if isinstance(file, Pair):
        vars(file.tower)["run"] = of(file.tower, lambda image: model.forward_tokens(torch.from_numpy(image)))
        vars(file.head)["run"] = of(file.head, lambda *arrays: model.head(*map(torch.from_numpy, arrays)))
    else:
        vars(file)["run"] = of(file, run)
    try:
        return file.predict(*images)
    except RunError as error:
        raise InputError(f"The model does not accept the sample image: {error}") from error


def draw_result(expected: np.ndarray, spec: ExportSpec) -> Image.Image | None:
    """The expected result as an image, for tasks that have one."""
    if spec.task == "restore":
        pixels = np.floor(expected * 255 + 0.5).astype(np.uint8)
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if spec.task == "stereo":
        top = max(float(np.nanmax(expected)), 1e-6)
        return Image.fromarray(np.uint8(np.nan_to_num(expected).clip(0) / top * 255))
    return None
