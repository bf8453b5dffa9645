"""Two images through a matching network: pixels of any kind in, fields in pixels out, within a bound of memory.

Images beyond the bound are reduced to it, and what is found is enlarged again: a network that looks for its matches
along the whole width cannot be cut into tiles as an upscaler can.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visionattn.errors import InputError
from visionattn.models import check_task
from visionattn.models.enlarged import EnlargedViews
from visionattn.predict.images.picture import Picture, read
from visionattn.predict.network import Network, OnnxNetwork, open_network
from visionattn.predict.tiles import bytes_per_pixel, free_memory

__all__ = ["SHIPPED", "Matcher", "as_tensor", "describe_unknown", "open_matcher", "pixels_of"]

SHIPPED = {"stereo": "va_match_stereo_nano"}  # the default model of a task
PEAKS = {"u1": 255.0, "u2": 65535.0}
UNKNOWN_MEMORY = 2**31  # bytes, where the system does not say what is free


class Matcher:
    """A matching network with a type of numbers and a bound of memory.

    Args:
        model: Takes two images (B, 3, H, W), RGB in 0..1, gives (B, C, H, W) in pixels, and states its `task`. Its
            device computes.
        task: "stereo" or "flow".
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, else the weights' type).
        max_pixels: Largest height times width that is computed. Default: what half of the free memory holds, by the
            tensors that a small pass keeps alive.
        low_resolution_start: Let the model find a start at half the size first, as its authors do from 2K on.
        enlarge: Let the model see images so many times as high and wide (see `EnlargedViews`).

    Attributes:
        notes: What is worth knowing of the last pair, in words.
        unknown: Of the last stereo pair, the share of the left view's pixels without a disparity.

    Raises:
        InputError: The model does something else, or an argument is not accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        dtype: str | torch.dtype = "auto",
        max_pixels: int | None = None,
        low_resolution_start: bool = False,
        enlarge: float = 1.0,
    ) -> None:
        check_task(model, task)
        if max_pixels is not None and max_pixels < 1:
            raise InputError(f"The bound is {max_pixels} pixels; it must be 1 or more.")
        self.task = task
        self.enlarge = enlarge
        if low_resolution_start:
            if not hasattr(model, "low_resolution_start"):
                raise InputError(f"{type(model).__name__} finds no start at half the size: leave that out.")
            model = _FromHalfSize(model)
        if enlarge != 1:
            model = EnlargedViews(model, enlarge)
        self.minimum: int = getattr(model, "size_minimum", 1)
        self.network = Network(model, dtype, "lower --max-pixels (max_pixels=)")
        self.max_pixels = max_pixels or self._default_pixels()
        self.notes: list[str] = []
        self.unknown = 0.0

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Match two images of one size.

        Args:
            first: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1: grey or RGB, alpha is laid on white.
            second: Likewise; the type may differ.

        Returns:
            (C, H, W) of float32: what the model gives, in pixels of these images. Stereo networks give no disparity
            below 0, and 0 is where they end: such pixels are NaN.

        Raises:
            InputError: The images differ in size or are too small, their type or values are not accepted, the memory
                does not suffice, or the result is not finite.
        """
        self.notes = []
        self.network.notes.clear()
        images = [as_tensor(pixels) for pixels in (first, second)]
        sizes = [tuple(image.shape[2:]) for image in images]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"The images are of {sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]} pixels; both must "
                "have one size, and be rectified for it in stereo. Crop or scale one of them."
            )
        height, width = sizes[0]
        if min(height, width) < self.minimum:
            raise InputError(
                f"The images are of {height} x {width} pixels; a side of {self.minimum} is the least: enlarge them."
            )
        images = self._reduced(images)
        result = self.network(*images)
        if not result.isfinite().all():
            raise InputError("The network's result is not finite: its weights are broken, or are not for this task.")
        if self.network.notes:
            self.notes.append(f"{self.network.notes[0]}, so that it was computed again")
        unknown = result <= 0 if self.task == "stereo" else torch.zeros_like(result, dtype=torch.bool)
        if result.shape[2:] != (height, width):
            ratios = [width / result.shape[3], height / result.shape[2]]
            # Flow has x and y of both ways, stereo x of both views.
            factors = torch.tensor(2 * (ratios if self.task == "flow" else ratios[:1]))[:, None, None]
            result = F.interpolate(result, (height, width), mode="bilinear") * factors
            unknown = F.interpolate(unknown.float(), (height, width), mode="bilinear") > 0
        result[unknown] = torch.nan
        self.unknown = float(unknown[0, 0].float().mean())
        return result[0].numpy()

    def _reduced(self, images: list[Tensor]) -> list[Tensor]:
        """The images within the bound, with a note where they were not."""
        height, width = images[0].shape[2:]
        if height * width <= self.max_pixels:
            return images
        ratio = math.sqrt(self.max_pixels / (height * width))
        size = max(int(height * ratio), 1), max(int(width * ratio), 1)
        if min(size) < self.minimum:
            raise InputError(
                f"{height} x {width} pixels reduced to the bound of {self.max_pixels} are {size[0]} x {size[1]}, and a "
                f"side of {self.minimum} is the least: raise --max-pixels (max_pixels=), or lower --enlarge (enlarge=)."
            )
        self.notes.append(
            f"{height} x {width} pixels are more than the bound of {self.max_pixels}, so that they were matched at "
            f"{size[0]} x {size[1]} and the result enlarged"
        )
        return [F.interpolate(image, size, mode="bilinear", antialias=True) for image in images]

    def _default_pixels(self) -> int:
        """What half of the free memory holds, by a small pass of the network at the size that it sees itself."""
        model = self.network.model
        if isinstance(model, EnlargedViews):
            model = model.network
        if isinstance(model, OnnxNetwork):
            model = model.outline
        free = free_memory(self.network.device)
        side = max(192, getattr(model, "size_minimum", 1))
        bytes_each = bytes_per_pixel(model, 3, side, views=2) * self.enlarge**2
        return int((UNKNOWN_MEMORY if free is None else free // 2) / bytes_each)


def open_matcher(
    task: str,
    model: str | Path | nn.Module | None,
    checkpoint: str | Path | None,
    device: str | torch.device,
    **matching: Any,
) -> Matcher:
    """Open a matching network.

    Args:
        task: "stereo" or "flow".
        model: As `open_network` takes it; None is the one that is shipped, unless there is a checkpoint.
        checkpoint: Likewise.
        device: Likewise.
        **matching: Further arguments of `Matcher`.

    Raises:
        VisionAttnError: There is no such model, file or device, it has no weights, or it does something else.
    """
    if model is None and checkpoint is None:
        model = SHIPPED.get(task)
        if model is None:
            raise InputError(f"No weights for {task} are shipped: give a weight file with --model FILE.")
    return Matcher(open_network(model, checkpoint, task, device), task, **matching)


class _FromHalfSize(nn.Module):
    """A matching network that starts from what it finds at half the size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.task = model.task
        self.size_minimum = 2 * getattr(model, "size_minimum", 1) - 1
        self.train(model.training)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B, C, H, W)."""
        return self.model(first, second, self.model.low_resolution_start(first, second))


def describe_unknown(share: float) -> list[str]:
    """The note on pixels without a disparity, in words; none where all have one."""
    if share <= 0:
        return []
    shown = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
    return [
        f"{shown} of the left view have no disparity, since the network found them at 0 or beyond: what is very far "
        "away, or further than where the axes of cameras that converge meet"
    ]


def pixels_of(image: object) -> tuple[np.ndarray, list[str]]:
    """The pixels (H, W) or (H, W, C) of what a user gives, and notes of what a file lost.

    Args:
        image: An array, which stays as it is; a PIL image; a float tensor (C, H, W) in 0..1; or the path of an image
            file, which is read upright.

    Raises:
        DataError: There is no such image file, or it is damaged.
        InputError: It is none of these.
    """
    if isinstance(image, np.ndarray):
        return image, []
    if isinstance(image, (str, os.PathLike)):
        picture = read(Path(image))
        return picture.pixels, picture.notes
    if isinstance(image, Image.Image):
        return Picture.of(image).pixels, []
    if not isinstance(image, Tensor):
        raise InputError("The image is neither an array (H, W) or (H, W, C), a PIL image, a tensor nor a path.")
    if not image.is_floating_point() or image.ndim != 3:
        raise InputError(f"The tensor is {tuple(image.shape)} of {image.dtype}; this takes floats (C, H, W).")
    return image.detach().float().cpu().movedim(0, -1).numpy(), []


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1 -> RGB (1, 3, H, W) of float32 in 0..1.

    Grey is replicated, and what alpha makes transparent becomes white.

    Raises:
        InputError: Shape, type or values are not accepted.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise InputError(f"The image's shape is {pixels.shape}; this takes (H, W) and (H, W, C) with C of 1 to 4.")
    if pixels.dtype.str[1:] not in PEAKS and pixels.dtype.kind != "f":
        raise InputError(f"The image's type is {pixels.dtype}; this takes uint8, uint16 and floats in 0..1.")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise InputError("The image holds values that are not finite (NaN or infinite): replace them.")
        if pixels.min() < 0 or pixels.max() > 1:
            raise InputError(
                f"The image holds floats from {pixels.min()} to {pixels.max()}; floats are 0..1: divide by the largest "
                "possible value, and clip."
            )
    values = torch.from_numpy(pixels.astype(np.float32) / np.float32(PEAKS.get(pixels.dtype.str[1:], 1.0)))
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        values = values[..., :-1] * alpha + (1 - alpha)
    return values.movedim(2, 0)[None].expand(-1, 3, -1, -1).contiguous()
