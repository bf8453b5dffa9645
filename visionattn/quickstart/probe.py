"""Evaluate a frozen backbone in seconds: which photograph does this patch belong to?

Patches of eight photographs from scikit-image: the left halves for training, the right halves for testing. The backbone
is a small vision transformer trained without labels, evaluated with k-NN and one linear head, and compared with the
same on raw images of 16 x 16 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

import visionattn
from visionattn.errors import require
from visionattn.quickstart import TITLE

MODEL = "va_minimal_vit_micro_patch4_32"
PHOTOGRAPHS = (
    *("brick", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry"),
)
SIDE, MOST = 64, 40  # side of a patch in pixels, and maximum number of patches per half
SETTINGS = {"heads": ("cls",), "lrs": (0.1,), "epochs": 20, "few_shot": ()}

README = """
| file | what it is |
| --- | --- |
| `photos/` | {train} patches of left halves in `train/`, {val} of right halves in `val/`, by photograph |
| `report/report.html` | accuracies with confidence intervals, overall and per class, compared with 16 x 16 pixels |
| `report/results.csv` | the same numbers as a table |

{summary}

Chance is {chance:.0f} %: the largest class has {largest} of {val} test patches. The backbone itself is not trained.

## The same by command, in this folder

    visionattn probe {model} --data photos --heads cls --lrs 0.1 --epochs 20 --few-shot '' --output again

## The same with your images

Put the images of each class into a folder of its own inside `train/` and `val/`. Any of timm's backbones works:

    visionattn probe tf_efficientnet_lite0.in1k --data YOUR_FOLDER

## In Python

    import visionattn

    report = visionattn.probe("{model}", "photos", heads=["cls"], lrs=[0.1], epochs=20, few_shot=[])
    print(report.summary())
"""


def visit(folder: Path, console: Console) -> None:
    """Crop, probe, and write the images and the report into `folder`."""
    counts = {
        split: [_cut(folder / "photos" / split, name, split) for name in PHOTOGRAPHS] for split in ("train", "val")
    }
    with console.status("Probing"):
        report = visionattn.probe(
            MODEL, folder / "photos", output=folder / "report", device="cpu", progress=False, **SETTINGS
        )
    summary = report.summary()
    console.print(f"{summary} The whole report: {folder / 'report' / 'report.html'}")
    train, val = (sum(counts[split]) for split in ("train", "val"))
    largest = max(counts["val"])
    text = README.format(
        train=train, val=val, summary=summary, model=MODEL, largest=largest, chance=100 * largest / val
    )
    (folder / "README.md").write_text(TITLE + text)


def _cut(folder: Path, name: str, split: str) -> int:
    """Write the patches of one half of a photograph, and return their number."""
    pixels = np.asarray(Image.fromarray(getattr(require("skimage.data", "images"), name)()).convert("RGB"))
    height, width = pixels.shape[:2]
    left, right = (0, width // 2) if split == "train" else (width // 2, width)
    corners = [(y, x) for y in range(0, height - SIDE + 1, SIDE) for x in range(left, right - SIDE + 1, SIDE)][:MOST]
    (folder / name).mkdir(parents=True)
    for number, (y, x) in enumerate(corners):
        Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(folder / name / f"{number:02d}.png")
    return len(corners)
