"""Textures of generated scenes: procedural ones, reproducible from an index, and photographs from folders.

A texture is float32 (3, h, w) around 0, with a standard deviation of about 1. A lookup interpolates bicubically in the
pyramid level with about one texture pixel per pixel of the view, so that details below a pixel are averaged
instead of aliased, and sub-pixel shifts look like shifts.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from visionattn.data.images import read_rgb

__all__ = ["KINDS", "POOL", "level", "lookup", "photograph", "procedural"]

KINDS = ("noise", "shapes", "tiles", "waves")
POOL = 64
"""Number of procedural textures."""
SIDE = 256
PHOTOGRAPH_SIDE = 512
MOST_PIXELS = 1.2  # texture pixels per pixel of the view


@lru_cache(maxsize=POOL)
def procedural(number: int) -> torch.Tensor:
    """The texture of an index below `POOL`, (3, 256, 256); kinds alternate. Its opposite sides match."""
    rng = np.random.default_rng((number, SIDE))
    image = {"noise": _noise, "shapes": _shapes, "tiles": _tiles, "waves": _waves}[KINDS[number % len(KINDS)]](rng)
    image -= image.mean((1, 2), keepdims=True)
    return torch.from_numpy((image / image.std()).astype(np.float32))


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with a power of the frequency, correlated between channels."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((3, SIDE, SIDE))) * frequency ** -rng.uniform(0.6, 1.8)
    image = np.fft.irfft2(spectrum, (SIDE, SIDE))
    return np.tensordot(np.eye(3) * rng.uniform(0.1, 0.6) + 1, image, 1)


def _shapes(rng: np.random.Generator) -> np.ndarray:
    """Discs and boxes of all sizes on top of each other, as in a heap of leaves."""
    image = np.zeros((3, SIDE, SIDE)) + rng.uniform(0, 1, (3, 1, 1))
    for size in np.sort(rng.uniform(0.02, 0.4, 180) ** 1.5 * SIDE)[::-1]:
        around = np.arange(-int(1.5 * size) - 1, int(1.5 * size) + 2)  # the corners of a box are at sqrt(2)
        cx, cy = rng.integers(0, SIDE, 2)
        turn, flat = rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        u = np.cos(turn) * around + np.sin(turn) * around[:, None]
        v = (np.cos(turn) * around[:, None] - np.sin(turn) * around) / flat
        inside = np.hypot(u, v) < size if rng.random() < 0.5 else np.maximum(abs(u), abs(v)) < size
        row, column = np.nonzero(inside)
        row, column = (cy + around[row]) % SIDE, (cx + around[column]) % SIDE
        image[:, row, column] = rng.uniform(0, 1, (3, 1)) + 0.05 * rng.standard_normal((3, len(row)))
    return image


def _tiles(rng: np.random.Generator) -> np.ndarray:
    """Bricks with joints, in shades of a colour: a pattern that repeats with small differences."""
    rows, columns = rng.integers(4, 25, 2)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    row = np.floor(y * rows).astype(int)
    across = x * columns + (row % 2) * rng.choice([0.0, 0.5])
    column = np.floor(across).astype(int) % columns
    shade = rng.uniform(0, rng.uniform(0.02, 1), (3, rows, columns))[:, row, column] + rng.uniform(0, 1, (3, 1, 1))
    joint = np.minimum(y * rows % 1, across % 1) < rng.uniform(0.05, 0.25)
    image = np.where(joint, rng.uniform(0, 1, (3, 1, 1)), shade)
    return image + rng.uniform(0, 0.05) * rng.standard_normal(image.shape)


def _waves(rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks and dots that repeat exactly."""
    y, x = np.mgrid[:SIDE, :SIDE] * (2 * np.pi / SIDE)
    image = np.zeros((3, SIDE, SIDE))
    for _ in range(rng.integers(1, 3)):
        (p, q), sharpness = rng.integers(3, 24, 2), rng.uniform(0.5, 4)
        wave = np.sin(p * x) if rng.random() < 0.5 else np.sin(p * x) * np.sin(q * y)
        image += np.tanh(sharpness * wave) * rng.uniform(-1, 1, (3, 1, 1))
    return image


@lru_cache(maxsize=256)
def photograph(path: Path) -> torch.Tensor:
    """An image file as texture, at most 512 pixels per side.

    Raises:
        DataError: The file is damaged or not an image.
    """
    image = Image.fromarray(read_rgb(path))
    image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    return torch.from_numpy((pixels - pixels.mean()) / max(float(pixels.std()), 1.0))


def level(texture: torch.Tensor, density: float) -> tuple[torch.Tensor, float]:
    """The pyramid level for a density of texture pixels per pixel of the view, and the density there."""
    halvings = max(0, math.ceil(math.log2(density / MOST_PIXELS)))
    halvings = min(halvings, int(math.log2(min(texture.shape[1:]))) - 2)
    factor = 2**halvings
    return F.avg_pool2d(texture, factor) if factor > 1 else texture, density / factor


def lookup(texture: torch.Tensor, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Colours at texture pixels (u, v), mirrored at the sides, bicubic: (N,), (N,) -> (3, N)."""
    height, width = texture.shape[1:]
    grid = np.stack([(2 * u + 1) / width - 1, (2 * v + 1) / height - 1], -1).astype(np.float32)
    found = F.grid_sample(
        texture[None],
        torch.from_numpy(grid)[None, None],
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    return found[0, :, 0].numpy()
