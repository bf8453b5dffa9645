"""Search a folder of photographs with any backbone, and find duplicates.

The images are patches of scikit-image's photographs, so that it is known which belong together; five patches have a
copy, smaller and strongly compressed. The backbone is a small vision transformer trained without labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

import visionattn
from visionattn.errors import require
from visionattn.quickstart import TITLE
from visionattn.search.api import search
from visionattn.search.duplicates import duplicates
from visionattn.search.files import read_vectors

MODEL = "va_minimal_vit_micro_patch4_32"
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket"),
)
SIDE, PARTS = 128, 9  # side of a patch in pixels, and patches per photograph; another one is the query
COPIED = ("brick_1", "chelsea_4", "coffee_3", "gravel_5", "rocket_4")
THRESHOLD = 0.9995  # the cosine similarities of this backbone are close together
NEAREST = 5

README = """
| file | what it is |
| --- | --- |
| `photos/` | {images} patches of {photographs} photographs from scikit-image; {copies} copies as `NAME_copy.jpg` |
| `query.jpg` | a patch of the cat that is not among them |
| `found.html` | the patches nearest to it, as a page; `found.json` has the values |
| `duplicates.html` | near-duplicates, with a cosine similarity of at least {threshold}; `duplicates.json` |
| `photos.index/` | the index: embeddings of the patches by {model} |

Of the {nearest} nearest patches of each patch, {same:.0f} % are of the same photograph; by chance {chance:.0f} %.
Of the {copies} copies, {recovered} are in a group with their original; other patches in the groups: {others}.
{usual} The right threshold depends on the backbone: start high, and look at the page.

## The same by command, in this folder

    visionattn index photos photos.index --model {model}
    visionattn search photos.index query.jpg --output found.html --overwrite
    visionattn duplicates photos.index --threshold {threshold} --overwrite

## The same with your images

Use any of timm's pretrained backbones, or a weight file, instead of {model}:

    visionattn index YOUR_FOLDER your.index --model tf_efficientnet_lite0.in1k

## In Python

    import visionattn

    index = visionattn.index("photos", "photos.index", "{model}")
    hits = visionattn.search(index, "query.jpg", top=12)
    print(hits[0].image, hits[0].score, visionattn.duplicates(index, threshold={threshold}))
"""


def visit(folder: Path, console: Console) -> None:
    """Crop, index, search, find copies, and measure; write everything into `folder`."""
    photographs = _cut(folder)
    with console.status("Indexing the patches"):
        index = visionattn.index(folder / "photos", folder / "photos.index", MODEL, device="cpu", progress=False)
    hits = search(index, folder / "query.jpg", output=folder / "found.html")
    found = duplicates(index, threshold=THRESHOLD, device="cpu", output=folder / "duplicates.html")
    same, chance = _same_photograph(index)
    groups = [set(group) for group in found.groups]
    copies = {(f"{name}.jpg", f"{name}_copy.jpg") for name in COPIED}
    recovered = [pair for pair in copies if any(set(pair) <= group for group in groups)]
    involved = {name for pair in recovered for name in pair}
    told = {
        "images": len(index.images), "photographs": photographs, "copies": len(COPIED), "threshold": THRESHOLD,
        "model": MODEL, "nearest": NEAREST, "same": 100 * same, "chance": 100 * chance, "recovered": len(recovered),
        "usual": found.describe_usual(), "others": sum(map(len, groups)) - len(involved),
    }  # fmt: skip
    console.print(
        f"Nearest to a patch of the cat: {', '.join(hit.image for hit in hits[:3])} ... Of the {NEAREST} nearest "
        f"patches of each, {100 * same:.0f} % are of the same photograph ({100 * chance:.0f} % by chance)."
    )
    console.print(f"Copies found: {len(recovered)} of {len(COPIED)}. {folder / 'duplicates.html'}")
    (folder / "README.md").write_text(TITLE + README.format(**told))


def _cut(folder: Path) -> int:
    """Write the patches of all photographs, the copies and the query; return the number of photographs."""
    data = require("skimage.data", "images")
    photos = folder / "photos"
    photos.mkdir()
    for name in PHOTOGRAPHS:
        pixels = np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB"))
        for number, part in enumerate(_parts(pixels)):
            if number < PARTS:
                Image.fromarray(part).save(photos / f"{name}_{number}.jpg", quality=95)
            elif name == "chelsea":
                Image.fromarray(part).save(folder / "query.jpg", quality=95)
    for name in COPIED:
        with Image.open(photos / f"{name}.jpg") as image:
            image.resize((96, 96)).save(photos / f"{name}_copy.jpg", quality=40)
    return len(PHOTOGRAPHS)


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    """Patches of (H, W, 3) in a grid of three by three, and one between four of them."""
    height, width = pixels.shape[:2]
    rows, columns = (np.linspace(0, length - SIDE, 3).astype(int) for length in (height, width))
    corners = [(row, column) for row in rows for column in columns]
    corners.append(((rows[0] + rows[1]) // 2, (columns[1] + columns[2]) // 2))
    return [pixels[row : row + SIDE, column : column + SIDE] for row, column in corners]


def _same_photograph(index: Any) -> tuple[float, float]:
    """Fraction of the nearest patches that are of the same photograph, without copies, and the fraction by chance."""
    vectors = read_vectors(index.folder, index.manifest, 0)
    kept = [row for row, name in enumerate(index.images) if not name.endswith("_copy.jpg")]
    names = np.array([index.images[row].rpartition("_")[0] for row in kept])
    cosines = vectors[kept] @ vectors[kept].T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1)[:, :NEAREST]
    return float((names[nearest] == names[:, None]).mean()), (PARTS - 1) / (len(kept) - 1)
