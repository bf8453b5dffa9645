"""Quick runs of `visionattn probe` over folders of small pictures."""

import csv

import numpy as np
from PIL import Image

NAME = "va_minimal_vit_nano_patch7_28"


def table(folder):
    with (folder / "results.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "sweep_seconds"} for row in csv.DictReader(file)]


def pictures(root, parts, broken=()):
    """Folders of small pictures, bright for class 1; `parts` says how many of each class."""
    random = np.random.default_rng(0)
    for part, counts in parts.items():
        for label, count in counts.items():
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                low = 128 if label == "one" else 0
                pixels = random.integers(low, low + 128, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    for name in broken:
        (root / name).write_bytes(b"no picture")
    return ["--data", str(root)]


TINY = ["--heads", "gap", "--lrs", "0.1", "--epochs", "2", "--few-shot", "", "--maps", "0", "--device", "cpu"]


def tiny(root, out, *more, weights="--random"):
    """The words of a quick run."""
    weighted = [weights] if weights == "--random" else ["--checkpoint", weights]
    return ["probe", NAME, *weighted, "--data", str(root), *TINY, *(["--output", str(out)] if out else []), *more]
