"""Train every minimal ViT and its controls with one recipe; one CSV row a run.

    python benchmarks/minimal_vit.py --data mnist --root FOLDER --epochs 20 --seeds 0 1 2
    python benchmarks/minimal_vit.py --data cifar10 --root FOLDER --epochs 100 --seeds 0 1 2 --device cuda

FOLDER holds MNIST's four idx files, or the CIFAR-10 sheets. Networks have the width and depth of the public
replication of arXiv 2410.13732 (6 blocks of width 64, MLP ratio 1, patch 7 on MNIST and 8 on CIFAR-10), so that its
numbers can stand beside ours. Rows that the CSV already holds are not run again; an interrupted grid goes on.

Groups of runs:
    variant      each form of `VARIANTS`; "_1head" and "_4heads" change the heads alone
    budget       attention-only networks made deeper or wider to the baseline's parameters
    readout      baseline and minimum read out by the mean or by attention instead of the class token
    replication  the replication's own architecture: post-norm, dropout 0.1, positions and T from N(0, 1)

Recipe, the same for all: AdamW (weight decay 0.05, none on vectors), batch 64, 1 epoch (at most a tenth of the run) of
warm-up, cosine to 0, peak learning rate 2e-3, gradient norm clipped at 1; MNIST shifted by up to 1 pixel, CIFAR-10
shifted by up to 4 and flipped.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

import visionattn
from report import environment, read_rows, write_rows
from visionattn.cost import count_macs, count_parameters
from visionattn.data.cifar import load_cifar10_sheets
from visionattn.data.mnist import load_mnist
from visionattn.models.minimal_vit import VARIANTS

BATCH = 64
PEAK = 2e-3
SHIFT = {"mnist": 1, "cifar10": 4}
NETWORK = {
    "mnist": {"model_name": "va_minimal_vit_nano_patch7_28", "patch_size": 7},
    "cifar10": {"model_name": "va_minimal_vit_nano_patch4_32", "patch_size": 8},
}

RUNS: dict[str, tuple[str, dict]] = {
    **{name: ("variant", {"mlp_ratio": 1, **changes}) for name, changes in VARIANTS.items()},
    "pair_1head": ("variant", {"mlp_ratio": 1, "num_heads": 1}),
    # T T^T has one head: beside it, the shared form with as many, and T T^T with as many as the shared form.
    "shared_nomlp_1head": ("variant", {**VARIANTS["shared_nomlp"], "num_heads": 1}),
    "symmetric_nomlp_4heads": ("variant", {**VARIANTS["symmetric_nomlp"], "num_heads": 4}),
    "nomlp_deeper": ("budget", {**VARIANTS["nomlp"], "depth": 9}),
    "nomlp_wider": ("budget", {**VARIANTS["nomlp"], "embed_dim": 80}),
    "minimum_deeper": ("budget", {**VARIANTS["minimum"], "depth": 35}),
    "minimum_wider": ("budget", {**VARIANTS["minimum"], "embed_dim": 152}),
    "baseline_mean": ("readout", {"mlp_ratio": 1, "global_pool": "avg"}),
    "baseline_attention": ("readout", {"mlp_ratio": 1, "global_pool": "map"}),
    "minimum_mean": ("readout", {**VARIANTS["minimum"], "global_pool": "avg"}),
    "minimum_attention": ("readout", {**VARIANTS["minimum"], "global_pool": "map"}),
    "replication_1head": ("replication", {"num_heads": 1, "mlp": True, "similarity": "pair", "values": "projected"}),
    "replication_4heads": ("replication", {"num_heads": 4, "mlp": True, "similarity": "pair", "values": "projected"}),
    "replication_symmetric": (
        "replication",
        {"num_heads": 1, "mlp": False, "similarity": "symmetric", "values": "projected"},
    ),
    "replication_minimum": (
        "replication",
        {"num_heads": 1, "mlp": False, "similarity": "collapsed", "values": "identity"},
    ),
}


class PostNormBlock(nn.Module):
    """Norm after each residual sum, dropout 0.1, hidden width of the MLP equal to that of the tokens."""

    def __init__(self, dim: int, num_heads: int, mlp: bool, similarity: str, values: str) -> None:
        super().__init__()
        self.attn = visionattn.blocks.MinimalAttention(dim, num_heads, similarity, values)
        for layer in (self.attn.qkv, self.attn.proj):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        if self.attn.triangle is not None:
            nn.init.normal_(self.attn.triangle)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) if mlp else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x)))
        return x if self.mlp is None else self.norm2(x + self.dropout(self.mlp(x)))


class Replication(nn.Module):
    """Class-token transformer with positions and class token from N(0, 1) and post-norm blocks."""

    def __init__(self, image_size: int, in_chans: int, patch_size: int, **block) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_chans, 64, patch_size, patch_size)
        self.token = nn.Parameter(torch.randn(1, 1, 64))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, 64))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[PostNormBlock(64, **block) for _ in range(6)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(self.dropout(x))[:, 0])


def build(data: str, run: str) -> nn.Module:
    """The network of a run, for the images of a data set."""
    group, settings = RUNS[run]
    if group == "replication":
        channels, size, _ = timm.get_pretrained_cfg(NETWORK[data]["model_name"]).input_size
        return Replication(size, channels, NETWORK[data]["patch_size"], **settings)
    return timm.create_model(**{**NETWORK[data], **settings})


def load(data: str, root: Path, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images (N, C, H, W) and labels (N,) of the two splits."""
    config = timm.get_pretrained_cfg(NETWORK[data]["model_name"])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.mean, config.std))
    read = load_mnist if data == "mnist" else load_cifar10_sheets
    splits = {}
    # No choice is made on held-out images, so that they are trained on too.
    for name, parts in {"train": ("train", "val"), "test": ("test",)}.items():
        images, labels = (np.concatenate(arrays) for arrays in zip(*(read(root, part) for part in parts)))
        images = torch.from_numpy(images)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        splits[name] = ((images / 255 - mean) / std).to(device), torch.from_numpy(labels).to(device)
    return splits


def augment(images: Tensor, data: str, generator: torch.Generator) -> Tensor:
    """Shift each image by its own whole number of pixels, and flip colour images half of the time."""
    count, _, height, width = images.shape
    reach, device = SHIFT[data], images.device
    offset = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(device)
    rows = offset[0] + torch.arange(height, device=device)  # (B, H)
    columns = offset[1] + torch.arange(width, device=device)  # (B, W)
    if data == "cifar10":
        flip = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
        columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (reach,) * 4, value=images.min().item())
    batch = torch.arange(count, device=device)
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in percent, mean cross entropy, expected calibration error (15 bins) in percent."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(1000)]).float()
    error = multiclass_calibration_error(logits.softmax(-1), labels, num_classes=10, n_bins=15)
    return {
        "accuracy": 100 * (logits.argmax(-1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "calibration_error": 100 * error.item(),
    }


def train(data: str, run: str, seed: int, epochs: int, root: Path, device: str) -> dict:
    """Train one network and return its row."""
    torch.manual_seed(seed)
    if device == "cpu":
        torch.set_num_threads(1)
    splits = load(data, root, device)
    images, labels = splits["train"]
    model = build(data, run).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=PEAK, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(images) // BATCH
    steps, warmup = epochs * per_epoch, min(per_epoch, epochs * per_epoch // 10)
    seconds: list[float] = []
    step, losses = 0, []
    for _ in range(epochs):
        model.train()
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: per_epoch * BATCH].to(device).split(BATCH):
            start = time.perf_counter()
            progress = (step - warmup) / max(1, steps - warmup)
            rate = step / warmup if step < warmup else (1 + math.cos(math.pi * progress)) / 2
            for group in optimizer.param_groups:
                group["lr"] = PEAK * rate
            loss = F.cross_entropy(model(augment(images[chosen], data, generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            step += 1
    size = tuple(images.shape[1:])
    return {
        "data": data,
        "train_images": len(images),
        "group": RUNS[run][0],
        "run": run,
        "seed": seed,
        "epochs": epochs,
        **{f"test_{key}": round(value, 4) for key, value in evaluate(model, *splits["test"]).items()},
        "train_loss": round(torch.stack(losses).mean().item(), 4),
        "parameters": count_parameters(model),
        "macs": count_macs(model, size),
        "step_ms": round(1000 * sorted(seconds)[len(seconds) // 2], 2),
        "threads": torch.get_num_threads(),
        **environment(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(NETWORK), required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; on CPU each uses one thread")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "minimal_vit.csv")
    args = parser.parse_args()

    rows = read_rows(args.output)
    done = {(r["data"], r["run"], int(r["seed"]), int(r["epochs"])) for r in rows}
    todo = [
        (args.data, run, seed, args.epochs)
        for seed, run in product(args.seeds, args.runs)
        if (args.data, run, seed, args.epochs) not in done
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train, *key, args.root, args.device) for key in todo]
        for count, future in enumerate(as_completed(futures), 1):
            row = future.result()
            write_rows(args.output, [row], key=("data", "run", "seed", "epochs"))
            print(f"[{count}/{len(todo)}] {row['run']} seed {row['seed']}: {row['test_accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
