"""Linear and attentive segmentation heads on frozen backbones, over generated scenes with exact masks.

    python -m benchmarks.probe.probe_segmentation --weights FOLDER

Scenes of 96 x 128 pixels show discs, squares, triangles and rings of random colours, grain and shading, which hide each
other, before a ground of other colours: the classes differ by their shape alone. 200 scenes train, 100 test; each seed
draws other scenes and other starting weights. Heads of one backbone and seed see the same tokens, and are compared on
the same test scenes: `ahead` is the mIoU of a head minus that of the linear one.

`--weights` is a folder with efficientnet_lite0_fp16.safetensors (ImageNet-1k); without it only the shipped ViT is
measured. Writes results/probe_segmentation.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import visionattn
from benchmarks.report import RESULTS, environment, write_rows

OUTPUT = RESULTS / "probe_segmentation.csv"
CLASSES = ("ground", "disc", "square", "triangle", "ring")
SIZE = (96, 128)
SCENES = {"train": 200, "test": 100}
SEEDS = (0, 1, 2)


class Case(NamedTuple):
    """A backbone, its weight file (empty for its own), the layer and the size of images."""

    name: str
    file: str
    layer: int
    size: tuple[int, int]


CASES = (
    Case("va_minimal_vit_micro_patch4_32", "", 7, (48, 64)),
    Case("efficientnet_lite0", "efficientnet_lite0_fp16.safetensors", 3, (192, 256)),
)


def scene(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw an image and its mask."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(float)
    mask = np.zeros(SIZE, np.uint8)
    picture = _surface(random, y, x)
    for label in random.integers(1, len(CLASSES), 4):
        side = random.uniform(28, 56)
        dy, dx = y - random.uniform(0, SIZE[0]), x - random.uniform(0, SIZE[1])
        radius = np.hypot(dy, dx)
        inside = {
            1: radius < side / 2,
            2: np.maximum(abs(dy), abs(dx)) < 0.45 * side,
            3: (abs(dy) < side / 2) & (abs(dx) < (dy + side / 2) / 2),
            4: (radius < side / 2) & (radius > side / 4),
        }[int(label)]
        picture[inside] = _surface(random, y, x)[inside]
        mask[inside] = label
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def _surface(random: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with a slope of brightness and grain."""
    angle, slope = random.uniform(0, 2 * np.pi), random.uniform(0, 0.6)
    shade = slope * (np.cos(angle) * x + np.sin(angle) * y)
    grain = random.normal(0, random.uniform(2, 16), (*SIZE, 1))
    return random.uniform(30, 225, 3) + shade[:, :, None] + grain


def write_scenes(root: Path, seed: int) -> None:
    """Write the scenes of a seed in the layout that `visionattn probe --task segmentation` reads."""
    for number, (part, count) in enumerate(SCENES.items()):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for place in range(count):
            image, mask = scene(np.random.default_rng((seed, number, place)))
            image.save(root / part / "images" / f"{place:04d}.png")
            mask.save(root / part / "masks" / f"{place:04d}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))


def measure(case: Case, root: Path, seed: int, weights: Path | None) -> list[dict[str, object]]:
    """Rows of the heads of a backbone."""
    report = visionattn.probe(
        case.name,
        root,
        task="segmentation",
        checkpoint=weights / case.file if weights and case.file else None,
        image_size=case.size,
        layers=[case.layer],
        seeds=[seed],
        no_pixels=bool(case.file),  # they are the same for every backbone of this grid
        device="cpu",
        progress=False,
    )
    linear = next(head for head in report.chosen() if head.name == "linear")
    rows = []
    for head in report.chosen():
        row: dict[str, object] = {"backbone": case.name, "seed": seed, "head": head.name, "lr": head.spec.lr}
        row |= {"grid": "x".join(map(str, report.layers[0].grid)), "parameters": head.parameters}
        row |= {metric.key: round(head.scores[metric.key][0], 5) for metric in report.metrics}
        row["ahead"] = round(head.scores["miou"][0] - linear.scores["miou"][0], 5)
        rows.append(row)
    return rows


def main() -> None:
    """Measure every case for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    origin = environment("cpu")
    rows = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            write_scenes(Path(folder), seed)
            for case in CASES:
                if not case.file or args.weights:
                    for row in measure(case, Path(folder), seed, args.weights):
                        print(row, flush=True)
                        rows.append({**row, **origin})
    write_rows(OUTPUT, rows)


if __name__ == "__main__":
    main()
