"""Good pictures, which the fuzzer damages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_photos(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(6):
        Image.fromarray(pixels(24, 32, 3) + np.uint8(number)).save(folder / f"{number}.png")


def write_images(folder: Path) -> None:
    image = Image.fromarray(pixels(12, 16, 3))
    exif = image.getexif()
    exif[274], exif[282], exif[305] = 6, 72.0, "a camera"
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm"):
        more = {"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {}
        image.save(folder / f"a.{suffix}", **more)
    Image.fromarray(pixels(12, 16).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(pixels(12, 16).astype(np.uint16) * 257).save(folder / "deep.tif", compression="tiff_deflate")
    Image.fromarray(pixels(12, 16, 4)).save(folder / "alpha.png")
