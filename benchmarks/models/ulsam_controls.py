"""Does ULSAM do anything? One recipe and as many epochs for all; one CSV row a run.

    python -m benchmarks.models.ulsam_controls --data cifar10 --root FOLDER_OF_SHEETS --width 0.25 --epochs 3
    python -m benchmarks.models.ulsam_controls --data NAME --root FOLDER --size 64 --epochs 30 --device cuda

A FOLDER holds train/CLASS/* and test/CLASS/*, images of any size, which are cropped to their central square and
resized; NAME is for the table. Rows that are already in the CSV file are not run again.

The network is `va_mobilenetv2_ulsam_050_32` without its attention, at any width: MobileNet-V2 with strides for small
images. Something is put behind its last block of 96 and of 160 channels, times the width (add), or in their place
(replace):

    baseline              nothing: the network as it is
    add_g1, _g4, _g8      ULSAM as in the paper, with 1, 4 and 8 subspaces
    add_scaled            ULSAM with the gain 1 + H W A
    add_se, add_eca       squeeze and excitation (reduction 16), efficient channel attention
    replace_g4, _scaled, _se, _eca    the same instead of the blocks
    deleted               the blocks are removed without replacement: the control that the paper lacks

Recipe: that of `small_images.py` (AdamW, batch 64, peak 2e-3, cosine, gradient norm clipped at 1; images shifted by up
to an eighth of their side and flipped). Accuracy comes with Wilson's 95 % interval for this number of test images; the
spread over seeds is in the rows. Latency is one image on one CPU thread, the median of 50 calls; its ratio is the
baseline's time over the run's in the same rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import EcaModule, SqueezeExcite
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import visionattn
from benchmarks.models.cifar_sheets import load_cifar10_sheets
from benchmarks.models.small_images import BATCH, PEAK
from benchmarks.report import RESULTS, environment, paired_milliseconds, read_rows, summarize, write_rows
from visionattn.blocks import SubspaceAttention
from visionattn.cost import count_macs, count_parameters

NETWORK = "va_mobilenetv2_ulsam_050_32"
PLACES = ("blocks.4.2", "blocks.5.2")


def nothing(dim: int) -> nn.Module:
    return nn.Identity()


def squeeze_excite(dim: int) -> nn.Module:
    return SqueezeExcite(dim, rd_ratio=1 / 16, rd_divisor=1)


SCALED = partial(SubspaceAttention, gain="scaled")
# Run -> mode and block of `visionattn.insert`, or nothing.
RUNS = {
    "baseline": None,
    "add_g1": ("add", partial(SubspaceAttention, num_subspaces=1)),
    "add_g4": ("add", SubspaceAttention),
    "add_g8": ("add", partial(SubspaceAttention, num_subspaces=8)),
    "add_scaled": ("add", SCALED),
    "add_se": ("add", squeeze_excite),
    "add_eca": ("add", EcaModule),
    "replace_g4": ("replace", SubspaceAttention),
    "replace_scaled": ("replace", SCALED),
    "replace_se": ("replace", squeeze_excite),
    "replace_eca": ("replace", EcaModule),
    "deleted": ("replace", nothing),
}


def build(run: str, width: float, classes: int, size: int) -> nn.Module:
    """The network of a run."""
    model = timm.create_model(NETWORK, places=(), width=width, num_classes=classes)
    if RUNS[run] is not None:
        mode, block = RUNS[run]
        visionattn.insert(model, block, PLACES, mode, input_size=(3, size, size))
    return model.to(memory_format=torch.channels_last)


def read_folder(root: Path, size: int, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, 3) and labels (N,) of the images under root/CLASS."""
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((root / name).iterdir()):
            with Image.open(path) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                square = picture.convert("RGB").crop((left, top, left + side, top + side))
            images.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
            labels.append(label)
    return np.stack(images), np.array(labels)


def load(data: str, root: Path, size: int, count: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images (N, 3, H, W) and labels (N,) of the two splits, the first `count` of those to train on."""
    if data == "cifar10":
        # No choice is made on held-out images, so that they are trained on too.
        parts = (load_cifar10_sheets(root, part) for part in ("train", "val"))
        train = [np.concatenate(arrays) for arrays in zip(*parts)]
        splits = {"train": train, "test": load_cifar10_sheets(root, "test")}
    else:
        classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
        splits = {name: read_folder(root / name, size, classes) for name in ("train", "test")}
    config = timm.get_pretrained_cfg(NETWORK)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.mean, config.std))
    found = {}
    for name, (images, labels) in splits.items():
        chosen = slice(count if name == "train" else None)
        maps = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2)
        found[name] = (maps / 255 - mean) / std, torch.from_numpy(labels[chosen])
    return found


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by its own whole number of pixels, an eighth of its side at most, and flip half of them."""
    count, _, height, width = images.shape
    reach, device = height // 8, images.device
    offset = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(device)
    flip = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    rows, columns = offset[0] + torch.arange(height, device=device), offset[1] + torch.arange(width, device=device)
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (reach,) * 4, value=images.min().item())
    batch = torch.arange(count, device=device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # in channels-last memory


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in percent with Wilson's 95 % interval, and mean cross entropy."""
    logits = torch.cat([model.eval()(batch) for batch in images.split(500)])
    n, p, z = len(labels), (logits.argmax(-1) == labels).double().mean().item(), statistics.NormalDist().inv_cdf(0.975)
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    loss = F.cross_entropy(logits, labels).item()
    return {"accuracy": 100 * p, "accuracy_low": 100 * low, "accuracy_high": 100 * high, "loss": loss}


@torch.inference_mode()
def latency(model: nn.Module, baseline: nn.Module, size: int) -> dict[str, str]:
    """Milliseconds of one image on one CPU thread, and the baseline's time over it, in the same rounds."""
    image = torch.randn(1, 3, size, size)
    calls = {
        name: partial(network.cpu().eval(), image) for name, network in {"baseline": baseline, "run": model}.items()
    }
    columns = summarize(paired_milliseconds(calls, "cpu", 50, warm_up=10), "baseline")["run"]
    return {"latency_ms": columns["median_ms"], "latency_ratio": columns["ratio"]}


def train(run: str, seed: int, args: argparse.Namespace) -> dict:
    """Train the network of a run and return its row."""
    epochs, size, device = args.epochs, args.size, args.device
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    splits = load(args.data, args.root, size, args.images)
    images, labels = (tensor.to(device) for tensor in splits["train"])
    classes = int(labels.max()) + 1
    model = build(run, args.width, classes, size).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=PEAK, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(images) // BATCH
    steps, warmup = epochs * per_epoch, min(per_epoch, epochs * per_epoch // 10)
    step, losses = 0, []
    for _ in range(epochs):
        model.train()
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: per_epoch * BATCH].to(device).split(BATCH):
            progress = (step - warmup) / max(1, steps - warmup)
            rate = step / warmup if step < warmup else (1 + math.cos(math.pi * progress)) / 2
            for settings in optimizer.param_groups:
                settings["lr"] = PEAK * rate
            loss = F.cross_entropy(model(augment(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
    found = evaluate(model, *(tensor.to(device) for tensor in splits["test"]))
    return {
        "data": args.data,
        "size": size,
        "width": args.width,
        "train_images": len(images),
        "test_images": len(splits["test"][1]),
        "run": run,
        "seed": seed,
        "epochs": epochs,
        **{f"test_{key}": round(value, 4) for key, value in found.items()},
        "train_loss": round(torch.stack(losses).mean().item(), 4),
        "parameters": count_parameters(model),
        "macs": count_macs(model, (3, size, size)),
        **latency(model, build("baseline", args.width, classes, size), size),
        **environment(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10 (sheets), or a name for a folder of images")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32, help="side of the images of a folder")
    parser.add_argument("--width", type=float, default=0.5, help="of the network, as a multiple of MobileNet-V2's")
    parser.add_argument("--images", type=int, help="train on the first so many images; all if not given")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; on CPU each uses one thread")
    parser.add_argument("--output", type=Path, default=RESULTS / "ulsam_controls.csv")
    args = parser.parse_args()
    if args.data == "cifar10" and args.size != 32:
        parser.error("CIFAR-10's images are 32 pixels wide")

    key = ("data", "size", "width", "train_images", "run", "seed", "epochs")
    images = len(load(args.data, args.root, args.size, args.images)["train"][0])
    done = {tuple(row[column] for column in key) for row in read_rows(args.output)}
    todo = [
        (run, seed)
        for seed, run in product(args.seeds, args.runs)
        if tuple(map(str, (args.data, args.size, args.width, images, run, seed, args.epochs))) not in done
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train, run, seed, args) for run, seed in todo]
        for number, future in enumerate(as_completed(futures), 1):
            row = future.result()
            write_rows(args.output, [row], key)
            print(f"[{number}/{len(todo)}] {row['run']} seed {row['seed']}: {row['test_accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
