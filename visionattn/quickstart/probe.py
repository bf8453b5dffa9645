"""Judge a frozen backbone in seconds: which photograph is this part of?

Parts of eight of scikit-image's photographs, the left half to train on and the right half to test. The backbone is a
small vision transformer that learned without labels; k-NN and one linear head read it, and the same on 16 x 16 pixels
stands beside.
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
SIDE, MOST = 64, 40  # pixels of a part, and parts of a half
SETTINGS = {"heads": ("cls",), "lrs": (0.1,), "epochs": 20, "few_shot": ()}

README = """
| file | what it is |
| --- | --- |
| `photos/` | {train} parts of left halves in `train/`, {val} of right halves in `val/`, by photograph |
| `report/report.html` | accuracies with intervals, of all and of each class, and 16 x 16 pixels beside, as a page |
| `report/results.csv` | the same numbers as a table |

{summary}

Chance is {chance:.0f} %, since the largest class has {largest} of {val} test parts. Nothing of the backbone is trained.

## The same by command, in this folder

    visionattn probe {model} --data photos --heads cls --lrs 0.1 --epochs 20 --few-shot '' --output again

## The same with your images

Images of each class lie in a folder of its own, below `train/` and `val/`. Any of timm's backbones will do:

    visionattn probe tf_efficientnet_lite0.in1k --data YOUR_FOLDER

## In Python

    import visionattn

    report = visionattn.probe("{model}", "photos", heads=["cls"], lrs=[0.1], epochs=20, few_shot=[])
    print(report.summary())
"""


def visit(folder: Path, console: Console) -> None:
    """Cut, probe, and leave the images and the report in `folder`."""
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
    """Write the parts of one half of a photograph; gives their number."""
    pixels = np.asarray(Image.fromarray(getattr(require("skimage.data", "images"), name)()).convert("RGB"))
    height, width = pixels.shape[:2]
    left, right = (0, width // 2) if split == "train" else (width // 2, width)
    corners = [(y, x) for y in range(0, height - SIDE + 1, SIDE) for x in range(left, right - SIDE + 1, SIDE)][:MOST]
    (folder / name).mkdir(parents=True)
    for number, (y, x) in enumerate(corners):
        Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(folder / name / f"{number:02d}.png")
    return len(corners)
