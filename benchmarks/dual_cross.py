"""DCAL beside the plain ViT that it contains: kinds of products, recognised and retrieved.

    python benchmarks/dual_cross.py --data FOLDER --epochs 10
    python benchmarks/dual_cross.py --data FOLDER --epochs 20 --runs plain

FOLDER holds attributes.csv and images.zip of fashion products. Learned is articleType, 30 kinds with at least 40
training items each; others are left out. Both runs are `va_dcal_nano_patch4_32` from the same start:

    plain    cross-entropy of the class token of self-attention, SA, alone: the network is then a plain ViT
    dcal     the losses of SA, global-local and pair-wise cross-attention, with learned weights (`DualCrossTask`)

Each is judged by what is read out: SA, which costs as much in both, or SA and global-local cross-attention. Accuracy is
that of the 1,408 test images, mAP that of ranking the gallery of the test part for each query by the cosine of the
class tokens. A step of `dcal` takes about twice the time of one of `plain`: with twice the epochs `plain` has as much.

Recipe: AdamW (weight decay 0.05, none on vectors), batch 64, peak 1e-3, one epoch of warm-up, cosine to 0, gradient
norm clipped at 1; images are flipped and shifted. Nothing was chosen on the test part.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from report import RESULTS, environment, read_rows, write_rows
from retrieval_heads import augment, normalise, read_images
from visionattn.blocks.dual_cross import UncertaintyWeighting
from visionattn.data.catalogue import MISSING, Part
from visionattn.data.catalogue_files import read_catalogue
from visionattn.data.ranking import score

NETWORK, ATTRIBUTE = "va_dcal_nano_patch4_32", "articleType"
BATCH, PEAK, DECAY = 64, 1e-3, 0.05
KEY = ("run", "seed", "epochs", "read")


def fit(run: str, images: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> nn.Module:
    """The trained network of a run."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(NETWORK, num_classes=int(labels.max()) + 1).to(args.device)
    model.sa_only = run == "plain"
    weighting = UncertaintyWeighting(3).to(args.device)
    optimizer = create_optimizer_v2(nn.ModuleList([model, weighting]), "adamw", lr=PEAK, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(images) // BATCH
    steps = args.epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        progress = (step - per_epoch) / max(1, steps - per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * ((step + 1) / per_epoch if progress < 0 else (1 + math.cos(math.pi * progress)) / 2)
        chosen = order[step % per_epoch * BATCH :][:BATCH].to(args.device)
        batch, targets = normalise(augment(images[chosen], generator), model.pretrained_cfg), labels[chosen]
        if run == "plain":
            loss = F.cross_entropy(model(batch), targets)
        else:
            logits = model.branch_logits(model.forward_branches(batch))
            loss = weighting(torch.stack([F.cross_entropy(branch, targets) for branch in logits]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def judge(model: Any, images: Tensor, part: Part) -> dict[str, float]:
    """Accuracy and mAP in percent of what the network reads out now."""
    batches = [normalise(batch, model.pretrained_cfg) for batch in images.split(500)]
    logits = torch.cat([model(batch).cpu() for batch in batches])
    features = torch.cat([F.normalize(model.embed(batch), dim=-1).cpu() for batch in batches])
    labels = part.labels[:, 0]
    known = labels != MISSING
    right = (logits.argmax(-1) == labels)[known].double().mean().item()
    return {"test_accuracy": 100 * right, "test_map": 100 * score(features, part, 0, ATTRIBUTE).map}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=("plain", "dcal"), default=("plain", "dcal"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "dual_cross.csv")
    args = parser.parse_args()
    args.pixels = timm.get_pretrained_cfg(NETWORK).input_size[-1]

    catalogue = read_catalogue("table", args.data / "attributes.csv", attributes=(ATTRIBUTE,), min_count=40)
    parts = {name: catalogue.part(name) for name in ("train", "test")}
    images = {name: pixels.to(args.device) for name, pixels in read_images(args, catalogue, parts).items()}
    known = parts["train"].labels[:, 0] != MISSING
    learned, labels = images["train"][known], parts["train"].labels[known, 0].to(args.device)
    done = {tuple(row[key] for key in KEY[:3]) for row in read_rows(args.output)}
    for seed, run in product(args.seeds, args.runs):
        if (run, str(seed), str(args.epochs)) in done:
            continue
        start = time.perf_counter()
        model: Any = fit(run, learned, labels, args, seed)
        seconds = f"{time.perf_counter() - start:.0f}"
        rows = []
        for read, sa_only in {"SA": True, "SA and GLCA": False}.items():
            if run == "plain" and not sa_only:
                continue  # was not trained
            model.sa_only = sa_only
            found = {key: f"{value:.2f}" for key, value in judge(model, images["test"], parts["test"]).items()}
            case = dict(zip(KEY, (run, seed, args.epochs, read)))
            rows.append({**case, **found, "seconds": seconds, **environment(args.device)})
            print(f"{case}: {found}", flush=True)
        write_rows(args.output, rows, key=KEY)


if __name__ == "__main__":
    main()
