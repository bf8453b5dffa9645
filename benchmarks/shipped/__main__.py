"""Measure every shipped weight file on held-out data, next to its baselines: results/shipped_weights.csv.

    python -m benchmarks.shipped --sr SR --published FILES --stereo SCENES --factor teddy=4 --cifar10 SHEETS

| task | option | baselines |
| --- | --- | --- |
| super-resolution | `--sr`: high-resolution images in `NAME/HR` | bicubic; files of `--published` of the same size |
| stereo | `--stereo`: scenes with ground truth, `--factor` of their PNGs | OpenCV's SGBM, gaps filled by row |
| flow | `--flow`: 32 generated pairs and scikit-image's stereo pair | OpenCV's DIS and Farneback; no motion |
| classification | `--cifar10`: sheets (`benchmarks.models.cifar_sheets`) | published ResNets in `--resnets` |
| retrieval | `--objects`: table of `tools/generated_objects.py` | pooled features of another shipped network; chance |
| backbone | as classification | the same network untrained; pixels |

Data that is not given is not measured, which is printed; its old rows stay. One thread; no figure is chosen on what it
is reported on, but for what the cards say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.report import RESULTS, environment, write_rows
from benchmarks.shipped import measures
from benchmarks.shipped.measures import Measured
from visionattn.evaluate.cli import add_factor, factors
from visionattn.weights import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sr", type=Path, metavar="FOLDER", help="folders NAME/HR of high-resolution images")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="published super-resolution files (.pth)")
    parser.add_argument("--stereo", type=Path, metavar="FOLDER", help="stereo scenes with ground truth")
    parser.add_argument("--flow", action="store_true", help="generated pairs and a packaged one")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="sheets of CIFAR-10")
    parser.add_argument("--objects", type=Path, metavar="TABLE", help="objects.csv")
    parser.add_argument("--resnets", type=Path, metavar="FOLDER", help="files resnet20_cifar10 and resnet56_cifar10")
    add_factor(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = run(
        {
            "restore": args.sr and partial(measures.upscaling, folder=args.sr, published=args.published),
            "stereo": args.stereo and partial(measures.stereo, folder=args.stereo, factor=factors(args.factor)),
            "flow": measures.flow if args.flow else None,
            "classify": args.cifar10 and partial(measures.cifar10, folder=args.cifar10, resnets=args.resnets),
            "retrieve": args.objects and partial(measures.retrieval, table=args.objects),
        }
    )
    if measured:
        rows = [asdict(row) | {"value": f"{row.value:.4f}"} | environment("cpu") for row in measured]
        write_rows(RESULTS / "shipped_weights.csv", rows, ("weights", "data"))


def run(tasks: dict[str, Callable[[str], list[Measured]] | None]) -> list[Measured]:
    """Measure each shipped name by the function of its task; print the rows, and what is left out."""
    found = []
    for name in sorted(file.stem for file in SHIPPED.glob("*.safetensors")):
        task = task_of(name)
        if not tasks.get(task):
            print(f"{name}: not measured, no data is given for the task {task!r}.", flush=True)
            continue
        for row in tasks[task](name):  # type: ignore[misc]
            print(*list(asdict(row).values()), sep=" | ", flush=True)
            found.append(row)
    return found


def task_of(name: str) -> str:
    """The task that a shipped model states."""
    network: Any = timm.create_model(name)
    return network.task


if __name__ == "__main__":
    main()
