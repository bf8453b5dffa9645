"""Draw images of objects with known attributes, for training search by attribute.

    python -m tools.generated_objects FOLDER [--images 12000] [--side 64] [--photographs FOLDER] [--seed 0]
    visionattn fit --config objects_cca --data.root FOLDER/objects.csv

Each image shows one object: its shape, colour, texture, size and the kind of its background are drawn independently
of each other, so that no attribute tells another one. Position, angle, brightness and hue vary within each value. A
background can also be a photograph, where a folder is given; validation and test images then use photographs of their
own. Writes FOLDER/images/NNNNN.png and the table FOLDER/objects.csv: four fifths train, a tenth each val and test.
"""

from __future__ import annotations

import argparse
import colorsys
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.images import find_images, read_rgb
from visionattn.errors import DataError

FINE = 3
"""Pixels drawn for each pixel of the image, per side."""
COLOURS = {
    "red": (0.0, 0.9, 0.85),
    "orange": (0.08, 0.9, 0.95),
    "yellow": (0.16, 0.9, 0.95),
    "green": (0.34, 0.85, 0.7),
    "cyan": (0.5, 0.8, 0.85),
    "blue": (0.63, 0.85, 0.85),
    "purple": (0.77, 0.75, 0.75),
    "pink": (0.9, 0.5, 0.95),
    "white": (0.0, 0.0, 0.97),
    "grey": (0.0, 0.0, 0.5),
    "black": (0.0, 0.0, 0.06),
}
"""Hue, saturation and value."""
SIZES = {"small": (0.24, 0.32), "medium": (0.44, 0.54), "large": (0.72, 0.85)}
"""Radius as a share of half the side; the gaps keep neighbours apart."""
TEXTURES = ("plain", "stripes", "checks", "dots", "noise")
BACKGROUNDS = ("plain", "gradient", "clutter")
PHOTOGRAPH = "photograph"
ATTRIBUTES = ("shape", "colour", "texture", "size", "background")
SPLITS = ("train",) * 8 + ("val", "test")
"""Of ten images or photographs in turn."""


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) < 0.68 + 0.32 * np.cos(5 * np.arctan2(v, u))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.9,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.73) < 0.22,
    "crescent": lambda u, v: (np.hypot(u, v) < 0.95) & (np.hypot(u - 0.45, v) > 0.75),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
    "triangle": lambda u, v: (v < 0.5) & (v + 1.732 * u > -0.95) & (v - 1.732 * u > -0.95),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95),
    "star": _star,
    "bar": lambda u, v: (abs(u) < 0.95) & (abs(v) < 0.26),
}
"""Whether points of the object's own axes, in units of its radius, belong to it."""


def draw(rng: np.random.Generator, side: int, photographs: Sequence[Path] = ()) -> tuple[np.ndarray, dict[str, str]]:
    """Draw one image.

    Args:
        rng: Random generator.
        side: Height and width in pixels.
        photographs: Files for backgrounds; none for generated backgrounds alone.

    Returns:
        uint8 (side, side, 3), and the value of each attribute.
    """
    backgrounds = (*BACKGROUNDS, PHOTOGRAPH) if photographs else BACKGROUNDS
    choices = {"shape": [*SHAPES], "colour": [*COLOURS], "texture": TEXTURES, "size": [*SIZES]}
    values = {name: str(rng.choice(among)) for name, among in (*choices.items(), ("background", backgrounds))}
    fine = FINE * side
    radius = rng.uniform(*SIZES[values["size"]])
    reach = max(1 - radius, 0.05)
    centre, angle = rng.uniform(-reach, reach, 2), rng.uniform(0, 2 * np.pi)
    y, x = (2 * (np.mgrid[:fine, :fine] + 0.5) / fine - 1) - centre[::-1, None, None]
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
    inside = SHAPES[values["shape"]](u, v)
    image = _background(rng, values["background"], fine, photographs)
    brightness = _texture(rng, values["texture"], x, y)
    painted = _shade(rng, values["colour"])[:, None, None] * brightness
    if values["colour"] == "black":  # a darker black is black: the texture is lighter
        painted = painted + 0.3 * (1 - brightness)
    image = np.where(inside, painted, image)
    image = image.reshape(3, side, FINE, side, FINE).mean((2, 4)) + rng.normal(0, 0.01, (3, side, side))
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0), values


def _shade(rng: np.random.Generator, colour: str) -> np.ndarray:
    """RGB in 0..1 of a colour's name, a little different each time."""
    hue, saturation, value = COLOURS[colour]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1
    return np.array(
        colorsys.hsv_to_rgb(hue, saturation * rng.uniform(0.85, 1), min(1, value * rng.uniform(0.85, 1.03)))
    )


def _texture(rng: np.random.Generator, texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of a texture, 0.4 to 1, at points whose unit is half a side."""
    period, turn = rng.uniform(0.16, 0.26), rng.uniform(0, 2 * np.pi)
    a, b = (np.cos(turn) * x + np.sin(turn) * y) / period, (np.cos(turn) * y - np.sin(turn) * x) / period
    if texture == "stripes":
        dark = a % 1 < 0.5
    elif texture == "checks":
        dark = (a % 1 < 0.5) ^ (b % 1 < 0.5)
    elif texture == "dots":
        dark = np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.3
    elif texture == "noise":
        grain = rng.uniform(size=(x.shape[0] // FINE, x.shape[1] // FINE))
        return 0.4 + 0.6 * grain.repeat(FINE, 0).repeat(FINE, 1)
    else:
        return np.ones_like(x)
    return np.where(dark, 0.45, 1.0)


def _background(rng: np.random.Generator, kind: str, fine: int, photographs: Sequence[Path]) -> np.ndarray:
    """RGB in 0..1, (3, fine, fine)."""
    if kind == PHOTOGRAPH:
        image = Image.fromarray(read_rgb(photographs[int(rng.integers(len(photographs)))]))
        part = int(min(image.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(length - part + 1)) for length in image.size)
        part_of = image.crop((left, top, left + part, top + part)).resize((fine, fine), Image.Resampling.BILINEAR)
        return np.asarray(part_of, np.float64).transpose(2, 0, 1) / 255
    first, second = rng.uniform(0.05, 0.95, (2, 3, 1, 1))
    if kind == "plain":
        return np.broadcast_to(first, (3, fine, fine))
    if kind == "gradient":
        y, x = np.mgrid[:fine, :fine] / fine - 0.5
        turn = rng.uniform(0, 2 * np.pi)
        share = 0.5 + (np.cos(turn) * x + np.sin(turn) * y) / np.sqrt(2)
        return first * share + second * (1 - share)
    cells = rng.uniform(0.05, 0.95, (3, 6, 6))
    image = Image.fromarray(np.rint(255 * cells).astype(np.uint8).transpose(1, 2, 0))
    return np.asarray(image.resize((fine, fine), Image.Resampling.NEAREST), np.float64).transpose(2, 0, 1) / 255


def write(folder: Path, images: int, side: int, photographs: Sequence[Path] = (), seed: int = 0) -> None:
    """Write the images and the table; image n is a function of the seed and n.

    Raises:
        DataError: The table exists already.
    """
    table = folder / "objects.csv"
    if table.exists():
        raise DataError(f"{table} exists: give another folder.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    own = {split: [path for n, path in enumerate(photographs) if SPLITS[n % 10] == split] for split in SPLITS}
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", *ATTRIBUTES])
        for n in range(images):
            split = SPLITS[n % 10]
            image, values = draw(np.random.default_rng((seed, n)), side, own[split])
            Image.fromarray(image).save(folder / "images" / f"{n:05d}.png")
            writer.writerow([f"{n:05d}", split, *(values[name] for name in ATTRIBUTES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--photographs", metavar="FOLDER", help="backgrounds, at least 10 images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.images, args.side, find_images(args.photographs) if args.photographs else (), args.seed)


if __name__ == "__main__":
    main()
