"""`upscale` for an array, PIL image, tensor or path, and the loop over tiles.

The loop writes each tile directly into the result, so that only one tile is in memory besides input and result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visionattn.errors import InputError, shorten
from visionattn.predict.engine import Engine, choose_engine, open_engine
from visionattn.predict.images.picture import Picture, read
from visionattn.predict.sizes import check_sides, fit, resample
from visionattn.predict.tiles import MIB, Tile, default_memory, plan, total_memory
from visionattn.progress import counted, session_console

__all__ = ["bleed", "reduce", "restore", "shrinks", "steps_of", "tiles_of", "upscale"]

PEAKS = {"u1": 255.0, "u2": 65535.0}
# Tensors that rounding creates from a tile's result: the clamped one, the rounded one, the one in its final type.
COPIES = 3
MOST_MEMORY = 2**30  # MiB, which is a pebibyte

Given = TypeVar("Given", np.ndarray, Tensor, Image.Image)


@overload
def upscale(
    image: Given,
    model: str | Path | nn.Module | None = ...,
    *,
    scale: int | None = ...,
    width: int | None = ...,
    height: int | None = ...,
    checkpoint: str | Path | None = ...,
    memory: float | None = ...,
    overlap: int | None = ...,
    device: str | torch.device = ...,
    dtype: str | torch.dtype = ...,
    engine: str = ...,
    precision: str | None = ...,
) -> Given: ...
@overload
def upscale(
    image: str | Path,
    model: str | Path | nn.Module | None = ...,
    *,
    scale: int | None = ...,
    width: int | None = ...,
    height: int | None = ...,
    checkpoint: str | Path | None = ...,
    memory: float | None = ...,
    overlap: int | None = ...,
    device: str | torch.device = ...,
    dtype: str | torch.dtype = ...,
    engine: str = ...,
    precision: str | None = ...,
) -> Image.Image: ...
def upscale(
    image: np.ndarray | Tensor | Image.Image | str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    scale: int | None = None,
    width: int | None = None,
    height: int | None = None,
    checkpoint: str | Path | None = None,
    memory: float | None = None,
    overlap: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "auto",
    precision: str | None = None,
) -> np.ndarray | Tensor | Image.Image:
    """Upscale an image.

    A colour model is applied to a grey image by replicating its channel and averaging the result; a one-channel model
    is applied to each channel of a colour image. A second or fourth channel that the model does not take is alpha: it
    is upscaled separately. Colours are first extended below transparent pixels, to avoid dark fringes.

    Args:
        image: An array (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1; a PIL image; a float tensor (C, H, W) or
            (B, C, H, W) in 0..1; or the path of an image file (EXIF orientation is applied). RGB order.
        model: A model with the task "restore": its name, a weight file, an exported .onnx or .ort file, or the module.
            Default: the shipped model for `scale`.
        scale: Upscaling factor: 2, 3 or 4, default 4. Other models have their own.
        width: Width of the result in pixels, instead of `scale`: the network's output is resampled with a Lanczos
            filter; an image that is already larger is only reduced.
        height: Height of the result in pixels. With both, the result is the largest within them; the aspect ratio is
            always kept.
        checkpoint: Weight file for a name.
        memory: Memory of a forward pass in MiB; larger images are split into tiles. Default: half of the free memory,
            on a CPU at most 256.
        overlap: Overlap of tiles on each side, in pixels. Default: the model's radius, which is exact.
        device: "auto" (a GPU if available; a module stays on its device), "cpu", "cuda:1". The image may be on another
            device.
        dtype: "float32", "float16", "bfloat16" or "auto" (float16 on a GPU, otherwise the type of the weights).
        engine: "torch", "onnxruntime", or "auto": the faster one if a tiled image takes over a minute on a CPU.
        precision: Old spelling of `dtype`: "fp32", "fp16" or "bf16".

    Returns:
        The same kind, type and channels as the image, in the requested size or r times as high and wide; clamped, and
        rounded for integer types. PIL images in other modes than L, LA, RGB, RGBA and I;16 become RGB or RGBA. A path
        returns a PIL image.

    Raises:
        InputError: Shape, type or values of the image, the model or an argument are not accepted, or a file has 16-bit
            colours, which PIL does not support.
        DataError: The image file does not exist, or is damaged.
        VisionAttnError: The model does not exist, or has no weights.
    """
    check_sides(width, height)
    picture = _picture_of(image)
    computes = open_engine(model, checkpoint, scale=scale, device=device, dtype=precision or dtype, engine=engine)

    def enlarge(pixels: np.ndarray) -> np.ndarray:
        size = fit(pixels.shape, width, height)
        if size is not None and shrinks(pixels, size):
            return reduce(pixels, size)
        found = _with_progress(computes, pixels, overlap, memory, engine == "auto")
        return found if size is None else resample(found, size)

    if picture is not None:
        return Picture(enlarge(picture.pixels), icc=picture.icc, exif=picture.exif, dpi=picture.dpi).image()
    if isinstance(image, Tensor):
        batch = image.detach().cpu()[(None,) * (4 - image.ndim)].movedim(1, -1)  # (B, H, W, C)
        # numpy does not support bfloat16.
        batch = batch if batch.dtype == torch.float64 else batch.float()
        result = torch.stack([torch.from_numpy(enlarge(one.numpy())) for one in batch]).movedim(-1, 1)
        return result.reshape(*image.shape[:-2], *result.shape[-2:]).to(image)
    pixels = np.asarray(image)
    return enlarge(pixels[:, :, None])[:, :, 0] if pixels.ndim == 2 else enlarge(pixels)


def shrinks(pixels: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether an image (H, W, C) is at least as large as a size, so that the network is not needed."""
    return size[0] <= pixels.shape[0] and size[1] <= pixels.shape[1]


def reduce(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduce (H, W, C) to a smaller size; colours are first extended below transparent pixels."""
    if pixels.shape[2] in (2, 4):
        pixels = np.concatenate([bleed(pixels[..., :-1], pixels[..., -1:]), pixels[..., -1:]], axis=2)
    return resample(pixels, size)


def _picture_of(image: object) -> Picture | None:
    """The image of a file or a PIL image; None for an array or a tensor. Raises for other types."""
    if isinstance(image, (str, os.PathLike)):
        picture = read(Path(image))
        if picture.pixels.dtype == np.uint16 and picture.pixels.shape[2] > 1:
            raise InputError(
                f"{shorten(image)} has 16-bit colours, which PIL does not support: write the result to a file with "
                "visionattn.upscale_files, or give an array."
            )
        return picture
    if isinstance(image, Image.Image):
        return Picture.of(image)
    if isinstance(image, Tensor):
        if not image.is_floating_point() or image.ndim not in (3, 4):
            raise InputError(
                f"The tensor must be floats (C, H, W) or (B, C, H, W); got {image.dtype} {tuple(image.shape)}."
            )
    elif not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        raise InputError("The image must be an array (H, W) or (H, W, C), a PIL image, a tensor or a path.")
    return None


def _with_progress(
    engine: Engine, pixels: np.ndarray, overlap: int | None, memory: float | None, choose: bool
) -> np.ndarray:
    """Call `restore`; for an image in tiles, show the progress and possibly use a faster engine."""
    _check(pixels)
    steps = steps_of(engine, pixels.shape, overlap, memory)
    if steps <= 2:
        return restore(engine, pixels, overlap, memory)
    if choose:
        engine, _ = choose_engine(engine, pixels, 1)
    with counted("tiles", steps_of(engine, pixels.shape, overlap, memory), session_console()) as advance:
        return restore(engine, pixels, overlap, memory, lambda: advance(1))


def restore(
    engine: Engine,
    pixels: np.ndarray,
    overlap: int | None = None,
    memory: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Upscale an array (H, W, C) of uint8, uint16 or floats in 0..1; the result has its type and channels.

    Args:
        engine: Engine that computes a tile.
        pixels: The image. Channels that the engine does not take are handled as in `upscale`.
        overlap: Overlap in pixels. Default: the engine's radius.
        memory: Memory of a forward pass in MiB.
        advance: Called after each tile.

    Raises:
        InputError: Type, values or channels are not accepted, or the result is not finite, has a wrong size, or exceeds
            the memory.
    """
    _check(pixels)
    height, width, channels = pixels.shape
    tiles = tiles_of(engine, height, width, overlap, memory)
    _check_result(engine.scale * height, engine.scale * width, channels * pixels.dtype.itemsize)
    result = np.empty((engine.scale * height, engine.scale * width, channels), pixels.dtype)
    colours = _colours(channels, engine)
    colour = pixels[..., :colours]
    if colours < channels:
        alpha = pixels[..., -1:]
        colour = bleed(colour, alpha)
        _fill(engine, alpha, result[..., -1:], tiles, advance, bounded=True)
    _fill(engine, colour, result[..., :colours], tiles, advance)
    return result


def tiles_of(engine: Engine, height: int, width: int, overlap: int | None, memory: float | None) -> list[Tile]:
    """The tiles of an image.

    Raises:
        InputError: Overlap or memory is negative or NaN, or the memory is too small for a tile.
    """
    overlap = engine.radius if overlap is None else overlap
    if overlap < 0:
        raise InputError(f"The overlap must be at least 0 pixels; got {overlap}.")
    if memory is not None and not 0 < memory <= MOST_MEMORY:
        raise InputError(f"The memory must be more than 0 and at most {MOST_MEMORY} MiB; got {memory}.")
    budget = default_memory(engine.device) if memory is None else memory * MIB
    each = engine.bytes_per_pixel + COPIES * engine.scale**2 * engine.channels * 4
    return plan(height, width, int(budget / each), overlap)


def steps_of(engine: Engine, shape: tuple[int, ...], overlap: int | None, memory: float | None) -> int:
    """Number of tiles that `restore` computes for an image (H, W, C): with alpha, each twice."""
    height, width, channels = shape
    return len(tiles_of(engine, height, width, overlap, memory)) * (2 if channels in (2, 4) else 1)


def bleed(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Extend the colours below transparent pixels: (H, W, C) and (H, W, 1) -> (H, W, C).

    Pixels with an alpha of 0 are often black, and an upscaler would mix them into the visible edge. Each such pixel
    takes the mean of the visible pixels in the smallest square block of 2, 4, 8 ... pixels that contains any.
    """
    hidden = torch.from_numpy(alpha[..., 0] == 0)
    if not hidden.any() or hidden.all():
        return colour
    values = torch.from_numpy(colour.astype(np.float32)).movedim(-1, 0)[None]  # (1, C, H, W)
    weight = (~hidden).float()[None, None]
    filled = _pyramid(values * weight, weight)[0].movedim(0, -1).numpy()
    if colour.dtype.kind == "u":
        filled = np.rint(filled)
    return np.where(hidden[..., None].numpy(), filled.astype(colour.dtype), colour)


def _pyramid(values: Tensor, weight: Tensor) -> Tensor:
    """Fill values (1, C, H, W), multiplied by weights (1, 1, H, W), where the weight is 0; some weight must not be."""
    height, width = weight.shape[-2:]
    mean = values / weight.clamp(min=1e-12)
    if weight.all():
        return mean
    coarse = _pyramid(*(F.avg_pool2d(x, 2, ceil_mode=True) for x in (values, weight)))
    spread = coarse.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width]
    return torch.where(weight > 0, mean, spread)


def _check(pixels: np.ndarray) -> None:
    if pixels.dtype.str[1:] not in PEAKS and pixels.dtype.kind != "f":
        raise InputError(f"The image must be uint8, uint16 or floats in 0..1; got {pixels.dtype}.")
    if not pixels.size or pixels.ndim != 3:
        raise InputError(f"The image has no pixels: its shape is {pixels.shape}.")
    if pixels.dtype.kind == "f" and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError(
            f"Floats must be in 0..1; got {pixels.min()} to {pixels.max()}: divide by the largest possible value, and "
            "clip."
        )


def _check_result(height: int, width: int, bytes_each: int) -> None:
    """Refuse a result larger than the machine's memory: otherwise the system would kill the process."""
    total = total_memory()
    if total is not None and height * width * bytes_each > total:
        raise InputError(
            f"The result of {height} x {width} pixels takes {height * width * bytes_each / 2**30:.1f} GiB, more than "
            f"the {total / 2**30:.1f} GiB of memory of this machine: split the image."
        )


def _colours(channels: int, engine: Engine) -> int:
    """Number of colour channels of an image."""
    if channels == engine.channels or channels in (1, 3):
        colours = channels
    elif channels in (2, 4):
        colours = channels - 1
    else:
        raise InputError(f"The image must have 1 (grey) to 4 (RGB and alpha) channels; got {channels}.")
    if colours not in (1, engine.channels) and engine.channels != 1:
        raise InputError(f"The image has {colours} colour channels; the model takes {engine.channels}.")
    return colours


def _fill(
    engine: Engine,
    source: np.ndarray,
    target: np.ndarray,
    tiles: list[Tile],
    advance: Callable[[], None],
    bounded: bool = False,
) -> None:
    """Compute all tiles of `source` (H, W, C) into `target` (r H, r W, C).

    `bounded` clamps each pixel to the range of its input pixel's 3 x 3 neighbourhood: opaque and fully transparent
    regions stay so.
    """
    peak = PEAKS.get(source.dtype.str[1:], 1.0)
    for tile in tiles:
        window = torch.from_numpy(source[tile.window].astype(np.float64 if engine.dtype.itemsize == 8 else np.float32))
        image = (window / peak).movedim(-1, 0)[None]  # (1, C, h, w)
        result = _apply(engine, image)
        expected = (*image.shape[:2], engine.scale * image.shape[2], engine.scale * image.shape[3])
        if tuple(result.shape) != expected:
            raise InputError(
                f"The network's output for {tuple(image.shape)} must be {expected}; got {tuple(result.shape)}."
            )
        if not result.isfinite().all():
            raise InputError("The network's output is not finite: its weights are damaged, or belong to another task.")
        if bounded:
            result = _between(result, image, engine.scale)
        rows, columns = tile.inside(engine.scale)
        kept = result[0, :, rows, columns].movedim(0, -1).clamp(0, 1)
        if source.dtype.kind == "u":
            kept = kept.mul_(peak).add_(0.5).floor_()
        target[tile.target(engine.scale)] = kept.numpy()
        advance()


def _apply(engine: Engine, image: Tensor) -> Tensor:
    """(1, C, h, w) -> (1, C, r h, r w) for any number of channels of the engine: see `upscale`."""
    channels = image.shape[1]
    if channels == engine.channels:
        return engine(image)
    if channels == 1:
        return engine(image.expand(-1, engine.channels, -1, -1).contiguous()).mean(dim=1, keepdim=True)
    return torch.cat([engine(channel) for channel in image.split(1, dim=1)], dim=1)


def _between(result: Tensor, image: Tensor, scale: int) -> Tensor:
    least, most = (
        sign
        * F.max_pool2d(sign * image, 3, stride=1, padding=1).repeat_interleave(scale, -2).repeat_interleave(scale, -1)
        for sign in (-1, 1)
    )
    return result.clamp(least, most)
