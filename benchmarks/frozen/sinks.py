"""Does it help a frozen backbone to redistribute the attention of its class token? And which map explains?

    python -m benchmarks.frozen.sinks --cifar SHEETS [--parts redistribution occlusion] [--images 4000]

Parts:
    redistribution   detector, beta, layers and heads are chosen on one half of CIFAR-10's test images by accuracy, and
                     tested on the other half; the control moves as much attention from random columns. 5 random halves
    occlusion        correlation with occlusion, deletion and insertion areas of maps: class attention of the last layer
                     and of all, with sinks taken out, received attention

The backbone is the supervised one of `benchmarks.frozen.backbones`, with its classifier. Writes
results/frozen_sinks.csv and results/frozen_occlusion.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.frozen.backbones import backbone
from benchmarks.frozen.pruning import test_images
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.frozen import observing
from visionattn.frozen.agreement import agreement
from visionattn.frozen.sinks import emphasising, outliers, redistribute, redistributing

SINKS, OCCLUSION = RESULTS / "frozen_sinks.csv", RESULTS / "frozen_occlusion.csv"
BETAS, DETECTORS, HALVES = (0.0, 0.4, 0.6, 0.8), ("outliers", "received"), 5
JUDGED, MASKS = 64, 500


@torch.no_grad()
def right(model: Any, images: Tensor, labels: Tensor, context: Any = None) -> Tensor:
    """Whether each image is classified correctly within a context."""
    with context or nullcontext():
        return torch.cat([model(batch).argmax(1) for batch in images.split(200)]) == labels


def candidates(model: Any) -> dict[str, Callable[..., Any]]:
    """Settings among which a half selects; called with a detector instead of their own they are the control."""
    count = len(model.blocks)
    late = [f"blocks.{index}.attn" for index in range(count // 2, count)]
    found: dict[str, Callable[..., Any]] = {}
    for detector in DETECTORS:
        for beta in BETAS:
            for where, layers in (("all", "*"), ("late", late)):

                def make(other: str | None = None, seed: int = 0, b=beta, d=detector, at=layers) -> Any:
                    return redistributing(model, b, other or d, at, seed=seed)

                found[f"{detector}, beta {beta:g}, {where} layers"] = make
    return found


def chosen_heads(results: dict[tuple[int, int], Tensor], base: Tensor, rows: Tensor) -> dict[str, list[int]]:
    """ACT's search: heads whose redistribution alone raises the accuracy of the half."""
    kept: dict[str, list[int]] = {}
    for (layer, head), correct in results.items():
        if correct[rows].sum() > base[rows].sum():
            kept.setdefault(f"blocks.{layer}.attn", []).append(head)
    return kept


def difference(one: Tensor, other: Tensor) -> dict[str, str]:
    """Mean of paired differences and half of its 95 % interval."""
    values = one.double() - other.double()
    return {"ahead": f"{values.mean():+.5f}", "half_interval": f"{1.96 * values.std() / len(values) ** 0.5:.5f}"}


def redistribution(model: Any, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Rows of every half's choices, tested on the other half against nothing and against the control."""
    base = right(model, images, labels)
    settings = candidates(model)
    results = {key: right(model, images, labels, make()) for key, make in settings.items()}
    results["emphasis"] = right(model, images, labels, emphasising(model))
    heads = {}
    for layer in range(len(model.blocks)):
        for head in range(model.blocks[layer].attn.num_heads):
            one = {f"blocks.{layer}.attn": [head]}
            heads[layer, head] = right(model, images, labels, redistributing(model, 0.4, heads=one))
    rows = []
    for seed in range(HALVES):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        half, rest = order.chunk(2)
        best = max(settings, key=lambda key: int(results[key][half].sum()))
        control = right(model, images[rest], labels[rest], settings[best]("random", seed))
        tested = {f"chosen: {best}": (results[best][rest], control), "emphasis": (results["emphasis"][rest], None)}
        kept = chosen_heads(heads, base, half)
        if kept:
            contexts = [
                redistributing(model, 0.4, detector, heads=kept, seed=seed) for detector in ("outliers", "random")
            ]
            pair = [right(model, images[rest], labels[rest], context) for context in contexts]
            tested[f"{sum(map(len, kept.values()))} heads chosen, beta 0.4"] = (pair[0], pair[1])
        for method, (correct, random) in tested.items():
            against = [("nothing", base[rest])] + ([("random columns", random)] if random is not None else [])
            for what, other in against:
                accuracy = {"accuracy": f"{correct.double().mean():.4f}", "control": f"{other.double().mean():.4f}"}
                row = {"backbone": "supervised", "half": seed, "method": method, "against": what, "images": len(rest)}
                rows.append({**row, **accuracy, **difference(correct, other), **environment("cpu")})
                print(*list(rows[-1].values())[:9], sep=" | ", flush=True)
    return rows


@torch.no_grad()
def occlusion(model: Any, images: Tensor) -> list[dict[str, Any]]:
    """Rows of maps of the supervised backbone."""
    weights: list[Tensor] = []
    with observing(model, lambda call: weights.append((call.q @ call.k.mT * call.scale).softmax(-1))):
        model(images)
    rows_of_class = [one[:, :, 0].mean(1) for one in weights]  # (n, 1 + N) per layer
    last = rows_of_class[-1][:, 1:]
    sinks = outliers(last)[:, None]
    maps = {
        "class attention, last layer": last,
        "class attention, mean of layers": torch.stack(rows_of_class).mean(0)[:, 1:],
        "last layer, sinks redistributed": redistribute(last[:, None], sinks, beta=0.0)[:, 0],
        "received attention, last layer": weights[-1].mean(dim=(1, 2))[:, 1:],
        "random": torch.rand(last.shape, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for name, values in maps.items():
        found = agreement(model, images, values, (8, 8), logits=True, masks=MASKS)
        row = {"backbone": "supervised", "map": name, "images": len(images), "masks": MASKS}
        row |= {"pearson": f"{found.mean:.4f}", "low": f"{found.interval.low:.4f}"}
        row |= {"high": f"{found.interval.high:.4f}"}
        for what, areas in (("deletion", found.deletion), ("insertion", found.insertion)):
            row |= {f"{what}_{order}": f"{areas[order].mean():.4f}" for order in areas}
        rows.append({**row, **environment("cpu")})
        print(*list(row.values()), sep=" | ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, metavar="SHEETS")
    parser.add_argument(
        "--parts", nargs="+", choices=("redistribution", "occlusion"), default=["redistribution", "occlusion"]
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/frozen"), help="trained backbones")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training a backbone that is not there")
    parser.add_argument("--images", type=int, default=4000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = test_images(args.cifar, args.images)
    model = backbone("supervised", args.cifar, args.runs, args.minutes)
    if "redistribution" in args.parts:
        write_rows(SINKS, redistribution(model, images, labels), key=("backbone",))
    if "occlusion" in args.parts:
        write_rows(OCCLUSION, occlusion(model, images[:: len(images) // JUDGED][:JUDGED]), key=("backbone",))


if __name__ == "__main__":
    main()
