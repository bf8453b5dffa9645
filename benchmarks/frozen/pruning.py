"""Smaller frozen backbones: accuracy against multiply-accumulates, compared with their controls.

    python -m benchmarks.frozen.pruning --cifar SHEETS [--backbones NAME ...] [--images 2000]

Tokens are cut before a quarter of the blocks has run, by every score of `visionattn.prune_tokens`; heads are pruned by
those scores of `visionattn.prune_heads` that need no labels; and whole blocks are left out. Accuracy is leave-one-out
k-NN (k 20, standardised, cosine) of CIFAR-10's test images, one class token per image for the supervised backbone and
the mean of the patches for the others.

`ahead_of_grid`, `ahead_of_random` and `ahead_of_blocks` are differences in accuracy, with the half of their 95 %
interval, paired by image: to the tokens of a grid at the same share, to random tokens or heads at the same share, and
to the row of left-out blocks that costs least but not less than 98 % of this row. Backbones are those of
`benchmarks.frozen.backbones`. Writes results/frozen_pruning.csv; rows of other backbones stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.frozen.backbones import backbone, prepare
from benchmarks.models.cifar_sheets import load_cifar10_sheets
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.frozen.curves import prune_curves

OUTPUT = RESULTS / "frozen_pruning.csv"
BACKBONES = ("micro", "supervised")


def test_images(cifar: Path, count: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10's test images, as many of each class, normalised, and their classes."""
    pixels, labels = load_cifar10_sheets(cifar, "test")
    classes = torch.from_numpy(labels).long()
    rows = torch.cat([(classes == one).nonzero().flatten()[: count // 10] for one in range(10)])
    return prepare(pixels[rows.numpy()]), classes[rows]


def ahead(row: dict[str, Any], control: dict[str, Any] | None) -> str:
    """Difference in accuracy and half of its 95 % interval, paired by image."""
    if control is None or control is row:
        return ""
    difference = row["correct"].double() - control["correct"].double()
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    return f"{float(difference.mean()):+.4f} ± {half:.4f}"


def controls(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """The columns of paired differences."""
    same = {other["score"]: other for other in rows if (other["method"], other["keep"]) == (row["method"], row["keep"])}
    blocks = [other for other in rows if other["method"] == "blocks" and other["macs"] >= 0.98 * row["macs"]]
    pruned = row["method"] in ("tokens", "heads")
    return {
        "ahead_of_grid": ahead(row, same.get("grid")) if pruned else "",
        "ahead_of_random": ahead(row, same.get("random")) if pruned else "",
        "ahead_of_blocks": ahead(row, min(blocks, key=lambda other: other["macs"], default=None)) if pruned else "",
    }


def measure(name: str, model: Any, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Rows of one backbone."""
    rows = prune_curves(
        model,
        images,
        labels,
        source="class" if name == "supervised" else "mean",
        progress=lambda line: print(f"{name}: {line}", flush=True),
    )
    found = []
    for row in rows:
        numbers = {key: f"{row[key]:.4f}" for key in ("error", "accuracy", "accuracy_low", "accuracy_high")}
        kept = {key: row[key] for key in ("method", "score", "keep", "parameters", "macs")}
        found.append(
            {"backbone": name, "images": len(images), **kept, **numbers, **controls(row, rows), **environment("cpu")}
        )
        print(*list(found[-1].values())[2:13], sep=" | ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, metavar="SHEETS")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--runs", type=Path, default=Path("runs/frozen"), help="trained backbones")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training a backbone that is not there")
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = test_images(args.cifar, args.images)
    for name in args.backbones:
        model = backbone(name, args.cifar, args.runs, args.minutes)
        write_rows(OUTPUT, measure(name, model, images, labels), key=("backbone",))


if __name__ == "__main__":
    main()
