"""Backbones compared by `visionattn probe A B C` on photographs of products: paired tests, costs, times by turns.

    python -m benchmarks.probe.probe_comparison --products FOLDER --weights FOLDER

FOLDER of products has the archive images.zip and attributes.csv; of ten kinds (subCategory) 25 photographs each train
and 20 test, drawn with seed 0. `--weights` holds EfficientNet-Lite0 (ImageNet-1k) and the CIFAR ResNets as safetensors.
Each backbone gets images of its own size. Writes results/probe_comparison.csv, one row per backbone.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import visionattn
from benchmarks.probe import cifar_resnet  # noqa: F401  # enters its names into timm's registry
from benchmarks.report import RESULTS, environment, write_rows

OUTPUT = RESULTS / "probe_comparison.csv"
KINDS, TRAIN, TEST = 10, 25, 20
BACKBONES = (
    "tf_efficientnet_lite0={weights}/efficientnet_lite0_fp16.safetensors",
    "va_minimal_vit_micro_patch4_32",
    "cifar_resnet20={weights}/resnet20_cifar10.safetensors",
    "cifar_resnet56={weights}/resnet56_cifar10.safetensors",
)


def lay_out(products: Path, folder: Path) -> None:
    """Photographs by kind, below train and test."""
    by_kind = defaultdict(list)
    with (products / "attributes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            by_kind[row["subCategory"]].append(row["id"])
    kinds = [kind for kind, members in by_kind.items() if len(members) >= 100][:KINDS]
    drawn = random.Random(0)
    with zipfile.ZipFile(products / "images.zip") as archive:
        for kind in kinds:
            members = by_kind[kind]
            drawn.shuffle(members)
            for part, some in (("train", members[:TRAIN]), ("test", members[TRAIN : TRAIN + TEST])):
                target = folder / part / kind.replace(" ", "_")
                target.mkdir(parents=True)
                for name in some:
                    (target / f"{name}.webp").write_bytes(archive.read(f"{name}.webp"))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="folder of the reports, which are not kept by default")
    args = parser.parse_args()
    backbones = [backbone.format(weights=args.weights) for backbone in BACKBONES]
    with tempfile.TemporaryDirectory() as folder:
        lay_out(args.products, Path(folder) / "products")
        found = visionattn.probe(
            backbones, Path(folder) / "products", output=args.output, overwrite=True, few_shot=(), device="cpu"
        )
    print(found.summary())
    rows = [{**row, **environment("cpu"), "seed": "0"} for row in found.rows()]
    write_rows(OUTPUT, rows, key=("backbone",))


if __name__ == "__main__":
    main()
