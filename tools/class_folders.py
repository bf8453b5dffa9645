"""Convert data sets to folders with one sub-folder per class, which every reader of image folders accepts.

    python -m tools.class_folders mnist --root FOLDER_OF_IDX_FILES --images 10000 --output FOLDER
    python -m tools.class_folders cifar10 --root FOLDER_OF_SHEETS --output FOLDER
    python -m tools.class_folders products --root FOLDER --attribute articleType --output FOLDER

`mnist` writes the first images of the training split, and the test split. `cifar10` reads the sheets that
`benchmarks.models.cifar_sheets` describes, and holds out the last one; torchvision's reader rejects them by their
checksums. `products` reads `attributes.csv` (columns id, split and attributes) and `images.zip` (ID.webp), keeps values
with at least 40 training images, and writes PNG.
"""

from __future__ import annotations

import argparse
import csv
import re
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks.models.cifar_sheets import CLASSES, SPLITS, load_cifar10_sheets
from visionattn.data.classify.mnist import load_mnist

LEAST = 40


def mnist(args: argparse.Namespace) -> None:
    for split, count in (("train", args.images), ("test", None)):
        for index, (image, label) in enumerate(zip(*(array[:count] for array in load_mnist(args.root, split)))):
            folder = args.output / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(folder / f"{index:05d}.png")


def cifar10(args: argparse.Namespace) -> None:
    for split in SPLITS:
        for index, (image, label) in enumerate(zip(*load_cifar10_sheets(args.root, split))):
            folder = args.output / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:05d}.png")


def products(args: argparse.Namespace) -> None:
    with (args.root / "attributes.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    counts = Counter(row[args.attribute] for row in rows if row["split"] == "train")
    with zipfile.ZipFile(args.root / "images.zip") as archive:
        for row in rows:
            if counts[row[args.attribute]] >= LEAST:
                folder = args.output / row["split"] / re.sub(r"[^\w-]+", "-", row[args.attribute])
                folder.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{row['id']}.webp") as file, Image.open(file) as image:
                    image.convert("RGB").save(folder / f"{row['id']}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["mnist", "cifar10", "products"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, help="number of training images of mnist (default: all)")
    parser.add_argument("--attribute", default="articleType", help="attribute of products (default: %(default)s)")
    args = parser.parse_args()
    {"mnist": mnist, "cifar10": cifar10, "products": products}[args.data](args)


if __name__ == "__main__":
    main()
