"""Run a matching network on two images of any pixel type, with bounded memory.

Larger images are reduced to the bound, and the result is enlarged: a network that searches for matches along the whole
width cannot be split into tiles as an upscaler can.
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

SHIPPED = {"stereo": "va_match_stereo_nano", "flow": "va_match_flow_nano"}  # the default model of a task
PEAKS = {"u1": 255.0, "u2": 65535.0}
UNKNOWN_MEMORY = 2**31  # bytes to assume if the system does not report its free memory


class Matcher:
    """A matching network with a dtype and a memory bound.

    Args:
        model: Takes two images (B, 3, H, W), RGB in 0..1, returns (B, C, H, W) in pixels, and states its `task`. It
            runs on its own device.
        task: "stereo" or "flow".
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        max_pixels: Largest height times width to compute. Default: as many as fit half of the free memory, estimated
            from the live tensors of a small forward pass.
        low_resolution_start: Start from the result at half the size, as the authors do for images of 2K and more.
        enlarge: Factor by which images are enlarged for the model (see `EnlargedViews`).

    Attributes:
        notes: Notes on the last pair.
        unknown: Fraction of the left view's pixels without a disparity in the last stereo pair.

    Raises:
        InputError: The model has another task, or an argument is not accepted.
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
            raise InputError(f"max_pixels must be at least 1; got {max_pixels}.")
        self.task = task
        self.enlarge = enlarge
        if low_resolution_start:
            if not hasattr(model, "low_resolution_start"):
                raise InputError(f"{type(model).__name__} does not support a low-resolution start: leave it out.")
            model = _FromHalfSize(model)
        if enlarge != 1:
            model = EnlargedViews(model, enlarge)
        self.minimum: int = getattr(model, "size_minimum", 1)
        self.network = Network(model, dtype, "lower --max-pixels (max_pixels=)")
        self.max_pixels = max_pixels or self._default_pixels()
        self.notes: list[str] = []
        self.unknown = 0.0

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Match two images of the same size.

        Args:
            first: (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; grey or RGB; alpha is composited on white.
            second: The same; the type may differ.

        Returns:
            float32 (C, H, W): the model's output in pixels of these images. Disparities of stereo networks are clamped
            at 0: such pixels are NaN.

        Raises:
            InputError: The images differ in size or are too small, their type or values are not accepted, there is not
                enough memory, or the result is not finite.
        """
        self.notes = []
        self.network.notes.clear()
        images = [as_tensor(pixels) for pixels in (first, second)]
        sizes = [tuple(image.shape[2:]) for image in images]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"Both images must have the same size (for stereo, after rectification); got {sizes[0][0]} x "
                f"{sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]} pixels. Crop or resize one of them."
            )
        height, width = sizes[0]
        if min(height, width) < self.minimum:
            raise InputError(
                f"Height and width must be at least {self.minimum} pixels; got {height} x {width}: enlarge the images."
            )
        images = self._reduced(images)
        result = self.network(*images)
        if not result.isfinite().all():
            raise InputError("The network's output is not finite: its weights are damaged, or belong to another task.")
        if self.network.notes:
            self.notes.append(f"{self.network.notes[0]}, so the pair was computed again")
        unknown = result <= 0 if self.task == "stereo" else torch.zeros_like(result, dtype=torch.bool)
        if result.shape[2:] != (height, width):
            ratios = [width / result.shape[3], height / result.shape[2]]
            # Flow has x and y in both directions, stereo has x for both views.
            factors = torch.tensor(2 * (ratios if self.task == "flow" else ratios[:1]))[:, None, None]
            result = F.interpolate(result, (height, width), mode="bilinear") * factors
            unknown = F.interpolate(unknown.float(), (height, width), mode="bilinear") > 0
        result[unknown] = torch.nan
        self.unknown = float(unknown[0, 0].float().mean())
        return result[0].numpy()

    def _reduced(self, images: list[Tensor]) -> list[Tensor]:
        """Reduce the images to the bound, with a note if they exceed it."""
        height, width = images[0].shape[2:]
        if height * width <= self.max_pixels:
            return images
        ratio = math.sqrt(self.max_pixels / (height * width))
        size = max(int(height * ratio), 1), max(int(width * ratio), 1)
        if min(size) < self.minimum:
            raise InputError(
                f"{height} x {width} pixels reduced to at most {self.max_pixels} pixels are {size[0]} x {size[1]}, but "
                f"sides must be at least {self.minimum}: raise --max-pixels (max_pixels=), or lower --enlarge "
                "(enlarge=)."
            )
        self.notes.append(
            f"{height} x {width} pixels exceed the maximum of {self.max_pixels}: the pair was matched at "
            f"{size[0]} x {size[1]} pixels, and the result enlarged"
        )
        return [F.interpolate(image, size, mode="bilinear", antialias=True) for image in images]

    def _default_pixels(self) -> int:
        """Number of pixels that fit half of the free memory, estimated from a small forward pass of the network."""
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
        model: As in `open_network`; None for the shipped model, unless a checkpoint is given.
        checkpoint: As in `open_network`.
        device: As in `open_network`.
        **matching: Further arguments of `Matcher`.

    Raises:
        VisionAttnError: The model, file or device does not exist, or the model has no weights or another task.
    """
    if model is None and checkpoint is None:
        model = SHIPPED[task]
    return Matcher(open_network(model, checkpoint, task, device), task, **matching)


class _FromHalfSize(nn.Module):
    """A matching network that starts from its result at half the size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.task = model.task
        self.size_minimum = 2 * getattr(model, "size_minimum", 1) - 1
        self.train(model.training)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B, C, H, W)."""
        return self.model(first, second, self.model.low_resolution_start(first, second))


def describe_unknown(share: float, filled: bool = False) -> list[str]:
    """A note on pixels for which the network found no disparity, filled or not; empty if it found all."""
    if share <= 0:
        return []
    shown = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
    return [
        f"{shown} of the left view {'had' if filled else 'have'} no disparity{' before filling' if filled else ''}, "
        "since the network found 0 or less: these points are very far away or, for converging cameras, behind the "
        "point where their axes meet"
    ]


def pixels_of(image: object) -> tuple[np.ndarray, list[str]]:
    """The pixels (H, W) or (H, W, C) of an image, and notes on what was lost when reading a file.

    Args:
        image: An array, which is returned unchanged; a PIL image; a float tensor (C, H, W) in 0..1; or the path of an
            image file (EXIF orientation is applied).

    Raises:
        DataError: The image file does not exist, or is damaged.
        InputError: The image has another type.
    """
    if isinstance(image, np.ndarray):
        return image, []
    if isinstance(image, (str, os.PathLike)):
        picture = read(Path(image))
        return picture.pixels, picture.notes
    if isinstance(image, Image.Image):
        return Picture.of(image).pixels, []
    if not isinstance(image, Tensor):
        raise InputError("The image must be an array (H, W) or (H, W, C), a PIL image, a tensor or a path.")
    if not image.is_floating_point() or image.ndim != 3:
        raise InputError(f"The tensor must be floats (C, H, W); got {image.dtype} {tuple(image.shape)}.")
    return image.detach().float().cpu().movedim(0, -1).numpy(), []


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1 to RGB, float32 (1, 3, H, W) in 0..1.

    Grey is replicated, and alpha is composited on white.

    Raises:
        InputError: Shape, type or values are not accepted.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or not pixels.size or pixels.shape[2] > 4:
        raise InputError(f"The image must have the shape (H, W) or (H, W, C) with 1 to 4 channels; got {pixels.shape}.")
    if pixels.dtype.str[1:] not in PEAKS and pixels.dtype.kind != "f":
        raise InputError(f"The image must be uint8, uint16 or floats in 0..1; got {pixels.dtype}.")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise InputError("The image contains values that are not finite (NaN or infinite): replace them.")
        if pixels.min() < 0 or pixels.max() > 1:
            raise InputError(
                f"Floats must be in 0..1; got {pixels.min()} to {pixels.max()}: divide by the largest possible value, "
                "and clip."
            )
    values = torch.from_numpy(pixels.astype(np.float32) / np.float32(PEAKS.get(pixels.dtype.str[1:], 1.0)))
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        values = values[..., :-1] * alpha + (1 - alpha)
    return values.movedim(2, 0)[None].expand(-1, 3, -1, -1).contiguous()
