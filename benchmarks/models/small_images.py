"""What the scripts share that train small networks on MNIST or CIFAR-10: data, recipe, measures, a grid of runs.

Recipe, the same for all: AdamW (weight decay 0.05, none on vectors), batch 64, 1 epoch (at most a tenth of the run) of
warm-up, cosine to 0, peak learning rate 2e-3, gradient norm clipped at 1; MNIST shifted by up to 1 pixel, CIFAR-10
shifted by up to 4 and flipped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
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

import visionattn  # noqa: F401  registers the names in CONFIG
from benchmarks.models.cifar_sheets import load_cifar10_sheets
from benchmarks.report import RESULTS, environment, read_rows, write_rows
from visionattn.cost import count_macs, count_parameters
from visionattn.data.classify.mnist import load_mnist

BATCH = 64
PEAK = 2e-3
SHIFT = {"mnist": 1, "cifar10": 4}
CONFIG = {"mnist": "va_minimal_vit_nano_patch7_28", "cifar10": "va_minimal_vit_nano_patch4_32"}  # for mean and std


def load(data: str, root: Path, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images (N, C, H, W) and labels (N,) of the two splits."""
    config = timm.get_pretrained_cfg(CONFIG[data])
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


def train(
    build: Callable[[str, str], nn.Module],
    group: str,
    data: str,
    run: str,
    seed: int,
    epochs: int,
    root: Path,
    device: str,
) -> dict:
    """Train the network `build(data, run)` and return its row."""
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
            for settings in optimizer.param_groups:
                settings["lr"] = PEAK * rate
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
        "group": group,
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


def run_grid(
    description: str,
    runs: dict[str, tuple[str, dict]],
    build: Callable[[str, str], nn.Module],
    data: tuple[str, ...],
    output: str,
) -> None:
    """Read the command line and train; runs that are already in the CSV file are not run again.

    Args:
        description: Text of the help.
        runs: Run -> group, and what `build` makes of it.
        build: Function of a module, (data, run) -> network.
        data: Data sets to choose from.
        output: Name of the CSV file in results/.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=data, default=data[0] if len(data) == 1 else None, required=len(data) > 1)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=sorted(runs), default=list(runs))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; on CPU each uses one thread")
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    args = parser.parse_args()

    done = {(r["data"], r["run"], int(r["seed"]), int(r["epochs"])) for r in read_rows(args.output)}
    todo = [
        (args.data, run, seed, args.epochs)
        for seed, run in product(args.seeds, args.runs)
        if (args.data, run, seed, args.epochs) not in done
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train, build, runs[key[1]][0], *key, args.root, args.device) for key in todo]
        for count, future in enumerate(as_completed(futures), 1):
            row = future.result()
            write_rows(args.output, [row], key=("data", "run", "seed", "epochs"))
            print(f"[{count}/{len(todo)}] {row['run']} seed {row['seed']}: {row['test_accuracy']:.2f} %", flush=True)
