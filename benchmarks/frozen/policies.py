"""What sparse attention costs frozen backbones: feature error and k-NN accuracy against multiply-accumulates.

    python -m benchmarks.frozen.policies --cifar SHEETS --products FOLDER [--backbones NAME ...] [--parts NAME ...]

Parts:
    photographs   4 photographs at 256 x 256 pixels, 4,096 tokens: error of the final patch features
    products      200 product photographs of ten kinds at 96 x 96 pixels, 576 tokens: k-NN accuracy by leaving one out
    router        the same at 64 x 64: a router trained on one half, compared on the other half with the best fixed
                  budget at equal cost

Backbones are those of `benchmarks.frozen.backbones`; two are trained for `--minutes` and kept in `--runs`. Writes
results/frozen_policies.csv and results/frozen_router.csv; rows of other backbones and parts stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.frozen.backbones import BACKBONES, backbone
from benchmarks.frozen.photographs import photographs, products
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.cost import count_macs
from visionattn.frozen import UnderPolicy, measure_policies
from visionattn.frozen.policies import Policy, TailOnly, Window
from visionattn.frozen.router import compare_router, offline_labels, route_scores, train_router

OUTPUT, ROUTER = RESULTS / "frozen_policies.csv", RESULTS / "frozen_router.csv"
PARTS = ("photographs", "products", "router")
BUDGET, SIDES = 0.125, {"photographs": 256, "products": 96, "router": 64}
BATCH, ROUTER_SEEDS = 20, 5


def table(name: str, part: str, model: nn.Module, images: Tensor, labels: Tensor | None) -> list[dict[str, Any]]:
    """Rows of all policies for the CSV file."""
    rows = measure_policies(
        model,
        list(images.split(BATCH)),
        labels,
        budgets=[BUDGET],
        progress=lambda line: print(f"{name}, {part}: {line}", flush=True),
    )
    found = []
    for row in rows:
        numbers = {key: value for key, value in row.items() if key != "plan"}
        for key, value in numbers.items():
            if isinstance(value, float):
                numbers[key] = f"{value:.4f}"
        sizes = {"images": len(images), "side": images.shape[3]}
        found.append({"backbone": name, "part": part, **sizes, **numbers, **environment("cpu")})
        print(*numbers.values(), sep=" | ", flush=True)
    return found


def route(name: str, model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Rows of a router, its control and its bound: trained on random halves, judged on the others."""
    budgets: list[Policy | None] = [TailOnly(), Window(0.125), Window(0.25), Window(0.5), None]
    size = tuple(images.shape[1:])
    macs = [count_macs(model if policy is None else UnderPolicy(model, policy), size) for policy in budgets]
    scores, features = route_scores(model, list(images.split(BATCH)), budgets)
    labels, found = offline_labels(scores), []
    for seed in range(ROUTER_SEEDS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = order.chunk(2)
        router = train_router(features[train], labels[train], len(budgets))
        choice = router(features[test]).argmax(1)
        for row in compare_router(scores[test], macs, choice, labels[test]):
            numbers = {"name": row["name"], "score": f"{row['score']:.5f}", "macs": f"{row['macs']:.0f}"}
            found.append({"backbone": name, "seed": seed, "images": len(test), **numbers, **environment("cpu")})
            print(name, seed, *numbers.values(), sep=" | ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cifar", type=Path, help="sheets of CIFAR-10, to train two of the backbones")
    parser.add_argument("--products", type=Path, help="images.zip and attributes.csv")
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time of a training")
    parser.add_argument("--runs", type=Path, default=Path("runs/frozen"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.backbones:
        model = backbone(name, args.cifar, args.runs, args.minutes)
        for part in args.parts:
            if part == "photographs":
                rows = table(name, part, model, photographs(SIDES[part]), None)
                write_rows(OUTPUT, rows, key=("backbone", "part"))
                continue
            if args.products is None:
                raise SystemExit(f"--products is required for the part {part}.")
            images, labels = products(args.products, SIDES[part], 200)
            if part == "products":
                write_rows(OUTPUT, table(name, part, model, images, labels), key=("backbone", "part"))
            else:
                write_rows(ROUTER, route(name, model, images), key=("backbone",))


if __name__ == "__main__":
    main()
