"""DCAL compared with the plain ViT that it contains: classification and retrieval of kinds of products.

    python -m benchmarks.retrieval.dual_cross --data FOLDER --epochs 10
    python -m benchmarks.retrieval.dual_cross --data FOLDER --epochs 20 --runs plain

FOLDER holds attributes.csv and images.zip of fashion products. Learned is articleType, 30 kinds with at least 40
training items each; others are left out. Both runs are `va_dcal_nano_patch4_32` from the same start:

    plain    cross-entropy of the class token of self-attention, SA, alone: the network is then a plain ViT
    dcal     the losses of SA, global-local and pair-wise cross-attention, with learned weights (`DualCrossTask`)

Each is judged by what is read out: SA, which costs as much in both, or SA and global-local cross-attention. Accuracy is
that of the 1,408 test images, mAP that of ranking the gallery of the test part for each query by the cosine of the
class tokens. A step of `dcal` takes about twice the time of one of `plain`: with twice the epochs `plain` has as much.

Recipe: AdamW (weight decay 0.05, none on vectors and positions), batch 64, peak 1e-3, an epoch of warm-up, cosine to 0,
gradient norm clipped at 1; images are flipped and shifted. Nothing was chosen on the test part.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.report import RESULTS, environment, read_rows, write_rows
from benchmarks.retrieval.retrieval_heads import augment, normalise, read_images
from visionattn.data.retrieval.catalogue import MISSING, Part
from visionattn.data.retrieval.catalogue_files import read_catalogue
from visionattn.metrics.ranking import score
from visionattn.train.classify import ClassifyTask
from visionattn.train.dual_cross import DualCrossTask

NETWORK, ATTRIBUTE = "va_dcal_nano_patch4_32", "articleType"
BATCH = 64
RECIPE: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1.0, "min_lr": 0.0}
KEY = ("run", "seed", "epochs", "read")


class Batches:
    """Augmented images and labels in an order of each epoch's own; what does not fill a batch is left out."""

    def __init__(self, images: Tensor, labels: Tensor, config: dict[str, Any], seed: int) -> None:
        self.images, self.labels, self.config = images, labels, config
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order[: len(self) * BATCH].split(BATCH):
            yield normalise(augment(self.images[chosen], self.generator), self.config), self.labels[chosen]


def fit(run: str, images: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> nn.Module:
    """The trained network of a run."""
    seed_everything(seed, verbose=False)
    settings = {"num_classes": int(labels.max()) + 1, **RECIPE}
    task: Any
    if run == "plain":
        task = ClassifyTask(NETWORK, model_args={"sa_only": True}, **settings)
    else:
        task = DualCrossTask(NETWORK, **settings)
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Batches(images, labels, task.net.pretrained_cfg, seed))
    return task.net.to(args.device).eval()


@torch.no_grad()
def judge(model: Any, images: Tensor, part: Part) -> dict[str, float]:
    """Accuracy and mAP in percent of what the network reads out now."""
    device = next(model.parameters()).device
    batches = [normalise(batch, model.pretrained_cfg).to(device) for batch in images.split(500)]
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "dual_cross.csv")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    args.pixels = timm.get_pretrained_cfg(NETWORK).input_size[-1]

    catalogue = read_catalogue("table", args.data / "attributes.csv", attributes=(ATTRIBUTE,), min_count=40)
    parts = {name: catalogue.part(name) for name in ("train", "test")}
    images = read_images(args, catalogue, parts)
    known = parts["train"].labels[:, 0] != MISSING
    learned, labels = images["train"][known], parts["train"].labels[known, 0]
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
