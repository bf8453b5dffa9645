"""Tiles that overlap by the network's receptive radius: exact results in bounded memory.

A pixel of the result depends only on input pixels within the radius. A window that extends that far beyond the kept
region therefore gives the same result as the whole image. At the image's border, the window ends too, and the network
pads it as it would pad the image.
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionattn.errors import InputError
from visionattn.predict.network import weight_of

__all__ = ["MIB", "WORKSPACE", "Tile", "bytes_per_pixel", "default_memory", "free_memory", "plan", "total_memory"]

MIB = 2**20
# A convolution keeps copies of its input and output in its own layout. Measured on a CPU for SPAN with 26 to 48
# channels and tiles of 128 to 1024 pixels, process memory besides the live tensors was 1.1 to 2.0 times their size.
WORKSPACE = 2.0
# Upper bound of the default on a CPU. Larger activations are allocated from the system again in every layer: SPAN took
# 7 microseconds per pixel in tiles of 256 x 256 pixels, 11 in 512 x 512 and 29 in 1024 x 1024.
MOST_ON_CPU = 256 * MIB
PROBE = 48  # side in pixels: small, but large enough that weights do not count as activations


@dataclass(frozen=True)
class Tile:
    """One step of the loop, in input pixels: the window to read, and the region of it to keep."""

    window: tuple[slice, slice]  # rows, columns
    kept: tuple[slice, slice]

    def inside(self, scale: int) -> tuple[slice, slice]:
        """Slices of the kept region in the window's result."""
        return tuple(  # type: ignore[return-value]
            slice(scale * (kept.start - window.start), scale * (kept.stop - window.start))
            for window, kept in zip(self.window, self.kept)
        )

    def target(self, scale: int) -> tuple[slice, slice]:
        """Slices of the kept region in the image's result."""
        return tuple(slice(scale * kept.start, scale * kept.stop) for kept in self.kept)  # type: ignore[return-value]


def plan(height: int, width: int, pixels: int, overlap: int) -> list[Tile]:
    """Split an image into tiles of about equal size; one tile if the image fits.

    Args:
        height: Height of the image.
        width: Width of the image.
        pixels: Maximum number of pixels in a window.
        overlap: Pixels by which a window extends beyond the kept region, on each side inside the image.

    Raises:
        InputError: A window of so few pixels would consist of overlap only.
    """
    side = max(1, math.isqrt(max(pixels, 1)))
    rows = min(height, side)
    columns = min(width, max(pixels // rows, 1))
    rows = min(height, max(pixels // columns, 1))
    lines = [_cut(height, rows, overlap), _cut(width, columns, overlap)]
    return [Tile((w_rows, w_cols), (rows, cols)) for w_rows, rows in lines[0] for w_cols, cols in lines[1]]


def _cut(length: int, window: int, overlap: int) -> list[tuple[slice, slice]]:
    """Windows and kept regions along one axis."""
    if window >= length:
        return [(slice(0, length), slice(0, length))]
    kept = window - 2 * overlap
    if kept < 1:
        raise InputError(
            f"The memory allows tiles of {window} x {window} pixels, but the overlap alone takes {2 * overlap}: "
            "raise --memory (memory=), or lower --overlap (overlap=)."
        )
    step = math.ceil(length / math.ceil(length / kept))
    parts = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [(slice(max(start - overlap, 0), min(stop + overlap, length)), slice(start, stop)) for start, stop in parts]


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors, without the model's own, and their peak."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        # Views of weights, such as transposed ones, share their storage.
        own = (*model.parameters(), *model.buffers())
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget(_: Any) -> None:
            self.bytes -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, forget)
        self.bytes += size


@torch.no_grad()
def bytes_per_pixel(model: nn.Module, channels: int, side: int = PROBE, views: int = 1) -> float:
    """Memory of a forward pass, in bytes per input pixel.

    It is estimated as the peak of the live tensors in a small pass, times `WORKSPACE` for buffers of convolutions.

    Args:
        model: The network.
        channels: Number of channels of an image.
        side: Height and width in the small pass.
        views: Number of images that the network takes; a pixel counts once for all of them.
    """
    weight = weight_of(model)
    shape = (1, channels, side, side)
    with _LiveTensors(model) as live:
        model(*[torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(views)])
    return WORKSPACE * live.peak / side**2


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def total_memory() -> int | None:
    """Memory of the machine in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def default_memory(device: torch.device) -> int:
    """Memory bound of a forward pass in bytes: half of the free memory, on a CPU at most `MOST_ON_CPU`."""
    free = free_memory(device)
    half = MOST_ON_CPU if free is None else free // 2
    return half if device.type == "cuda" else min(half, MOST_ON_CPU)
