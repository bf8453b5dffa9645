"""Images for the measurements on frozen models: scikit-image's photographs, and products with their kinds."""

from __future__ import annotations

import csv
import io
import random
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from benchmarks.frozen.backbones import prepare

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
KINDS = 10


def square(image: Image.Image, side: int) -> np.ndarray:
    """The central square of an image, resized."""
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge)
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box))


def photographs(side: int, count: int = len(PHOTOGRAPHS)) -> Tensor:
    """Photographs that come with scikit-image, (n, 3, side, side)."""
    names = PHOTOGRAPHS[:count]
    return prepare(np.stack([square(Image.fromarray(getattr(skimage.data, name)()), side) for name in names]))


def products(folder: Path, side: int, count: int) -> tuple[Tensor, Tensor]:
    """Photographs of products of ten kinds, as many of each, drawn with seed 0: (n, 3, side, side) and kinds (n,)."""
    by_kind = defaultdict(list)
    with (folder / "attributes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            by_kind[row["subCategory"]].append(row["id"])
    kinds = [members for members in by_kind.values() if len(members) >= 100][:KINDS]
    drawn, pixels, labels = random.Random(0), [], []
    with zipfile.ZipFile(folder / "images.zip") as archive:
        for kind, members in enumerate(kinds):
            for name in drawn.sample(members, count // KINDS):
                with Image.open(io.BytesIO(archive.read(f"{name}.webp"))) as image:
                    pixels.append(square(image, side))
                labels.append(kind)
    return prepare(np.stack(pixels)), torch.tensor(labels)
