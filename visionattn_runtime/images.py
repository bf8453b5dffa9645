"""Images: reading with checks, resizing and cropping to a file's size as in timm, and division into tiles."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from visionattn_runtime.errors import RunError, short

__all__ = ["cut", "eight_bits", "fit_image", "pad", "read_image", "resize_map", "unit"]

MOST_PIXELS = 2**29  # in an image file that is decoded
PEAKS = {"u1": 255, "u2": 65535}


def read_image(image: Any, channels: int = 3) -> np.ndarray:
    """Read the pixels of an image: (H, W, C) of uint8, uint16 or float32 in 0..1.

    Args:
        image: A path, whose image is rotated upright; a PIL image; or an array (H, W) or (H, W, C).
        channels: Number of channels C to return: 3 for RGB, 1 for grey. Alpha is blended onto white.

    Raises:
        RunError: The file cannot be read, or shape, type or values are not accepted.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open(Path(image))
    if isinstance(image, Image.Image):
        image = _pixels(image)
    if not isinstance(image, np.ndarray):
        raise RunError(f"An image must be a path, a PIL image or an array; got a {type(image).__name__}.")
    pixels = image[:, :, None] if image.ndim == 2 else image
    if pixels.ndim != 3 or not pixels.size or pixels.shape[2] > max(4, channels):
        raise RunError(f"An image array must be (H, W) or (H, W, C) with C of 1 to 4; got the shape {image.shape}.")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise RunError("The image holds NaN or infinite values: replace them.")
        if pixels.min() < 0 or pixels.max() > 1:
            raise RunError(
                f"The image holds floats from {pixels.min():g} to {pixels.max():g}; floats must be in 0..1: divide by "
                "the largest possible value, such as 255."
            )
        pixels = pixels.astype(np.float32)
    elif pixels.dtype.str[1:] not in PEAKS:
        raise RunError(f"An image array must be of uint8, uint16 or floats in 0..1; got {pixels.dtype}.")
    return _with_channels(pixels, channels)


def _open(path: Path) -> Image.Image:
    try:
        if not path.is_file():  # reading a pipe could block forever
            raise RunError(f"There is no file {short(path)}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images and of damaged metadata
            image = Image.open(path)
            if image.width * image.height > MOST_PIXELS:
                raise RunError(f"{short(path)} has {image.width} x {image.height} pixels; at most 2**29 are read.")
            return ImageOps.exif_transpose(image)
    except RunError:
        raise
    # PIL can raise any exception on damaged files.
    except Exception as error:
        raise RunError(f"Cannot read the image {short(path)}: {short(error).rstrip('.')}.") from error


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        raise RunError("The image has 32 bits per channel, whose range is unknown; it must have 8 or 16 bits.")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"))


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    peak = PEAKS.get(pixels.dtype.str[1:], 1)
    if pixels.shape[2] != channels and pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.float32) / peak
        pixels = _like(pixels[..., :-1] * alpha + peak * (1 - alpha), pixels.dtype)
    if pixels.shape[2] == channels:
        return pixels
    if channels == 1:
        return _like(pixels @ np.array([[0.299], [0.587], [0.114]], np.float32), pixels.dtype)
    if pixels.shape[2] != 1:
        raise RunError(f"The image has {pixels.shape[2]} channels; this file requires {channels}.")
    return np.repeat(pixels, channels, axis=2)


def _like(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (values if dtype.kind == "f" else np.rint(values)).astype(dtype)


def unit(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels to float32 in 0..1."""
    return pixels.astype(np.float32) / np.float32(PEAKS.get(pixels.dtype.str[1:], 1))


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels to uint8."""
    return pixels if pixels.dtype == np.uint8 else np.floor(unit(pixels) * 255 + np.float32(0.5)).astype(np.uint8)


def fit_image(pixels: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Resize and crop an image as timm does for evaluation: (H, W, C) of any size -> uint8 of the file's size.

    Args:
        pixels: The image.
        spec: The file's metadata; `input_size`, `crop_pct`, `crop_mode`, `interpolation` and `mean` are used.
    """
    pixels = eight_bits(pixels)
    channels, height, width = spec["input_size"]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    image = image.resize(_scaled(image, spec), Image.Resampling[(spec["interpolation"] or "bilinear").upper()])
    scaled = np.asarray(image).reshape(image.height, image.width, channels)
    # Padding has the mean colour in timm's mode "border", and is black in the others.
    border = spec["crop_mode"] == "border" and spec["mean"]
    fitted = np.empty((height, width, channels), np.uint8)
    fitted[:] = [min(255, round(255 * mean)) for mean in spec["mean"]] if border else 0
    parts = [_centred(side, own) for side, own in zip(scaled.shape, (height, width))]
    (from_rows, to_rows), (from_columns, to_columns) = parts
    fitted[to_rows, to_columns] = scaled[from_rows, from_columns]
    return fitted


def _scaled(image: Image.Image, spec: dict[str, Any]) -> tuple[int, int]:
    """Width and height before the crop."""
    height, width = (math.floor(side / (spec["crop_pct"] or 1)) for side in spec["input_size"][1:])
    mode = spec["crop_mode"] or "center"
    if mode == "squash":
        return width, height
    if mode == "center" and height == width:
        shorter = min(image.size)
        return tuple(width if side == shorter else int(width * side / shorter) for side in image.size)  # type: ignore[return-value]
    ratios = image.width / width, image.height / height
    ratio = max(ratios) if mode == "border" else min(ratios)
    return round(image.width / ratio), round(image.height / ratio)


def _centred(given: int, wanted: int) -> tuple[slice, slice]:
    """Slices along one side: of the given image, and of the fitted image that it is copied to."""
    if given >= wanted:
        start = round((given - wanted) / 2)
        return slice(start, start + wanted), slice(0, wanted)
    start = (wanted - given) // 2
    return slice(0, given), slice(start, start + given)


def pad(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the last row and column until an image (H, W, C) has this size."""
    below, right = height - pixels.shape[0], width - pixels.shape[1]
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge") if below or right else pixels


def resize_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolate a map (H, W) of float32 bilinearly; pixels are areas, and a smaller map averages them."""
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def cut(length: int, window: int, overlap: int, fixed: bool) -> list[tuple[slice, slice]]:
    """Divide one side of an image into overlapping windows.

    Args:
        length: Length of the side, in pixels.
        window: Maximum length of a window.
        overlap: Margin by which a window extends beyond its kept interval, except at the image's border.
        fixed: Every window must have the length `window`.

    Returns:
        For each window, the interval that is read and the interval that is kept.

    Raises:
        RunError: `window` is not larger than twice the overlap.
    """
    if window >= length:
        return [(slice(0, length), slice(0, length))]
    kept = window - 2 * overlap
    if kept < 1:
        raise RunError(
            f"Tiles of {window} pixels must be larger than their overlap of {2 * overlap}: export the file with a "
            "dynamic size, or with a larger --image-size."
        )
    step = math.ceil(length / math.ceil(length / kept))
    reach = window if fixed else min(window, step + 2 * overlap)
    parts: Sequence[tuple[int, int]] = [(start, min(start + step, length)) for start in range(0, length, step)]
    starts = [min(max(start - overlap, 0), length - reach) for start, _ in parts]
    return [(slice(start, start + reach), slice(*part)) for start, part in zip(starts, parts)]
