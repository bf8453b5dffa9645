"""A sweep of 32 heads compared with trainings of one head: over cached tokens, and with the backbone on the fly.

    python -m benchmarks.probe.probe_sweep --device cpu
    python -m benchmarks.probe.probe_sweep --cases "in memory, 64 x 192, 32 ep_8"

Writes results/probe_sweep.csv, case by case; rows of other cases and devices stay. All train an epoch with LARS on
random tokens, evaluate the held-out images, then test, and read float16 from a memory-mapped file. `from disk` drops
the file from the system's page cache before each pass, as a cache larger than the memory would be. `live` stores no
tokens: a timm backbone with random weights computes them in each pass from random images in memory.

Trainings:
    sweep of 32        visionattn's sweep
    runs               its sweep over one head, 32 times
    loops              a plain training loop, 32 times, efficient probing in its authors' order: all tokens are
                       projected to values, which the queries then average; not where the backbone is live
    slowest run        the one of the runs with the largest median, where the backbone is live

Runs and loops are timed for one head of each pooling, in turn with the sweep, and counted as often as the sweep has
such heads. `seconds` is by the clock, `cpu_seconds` what the process computed, which other work on the machine disturbs
less; both are medians over the rounds. `share` is the sweep's time over that of the 32, 1/32 where they share all and 1
where they share nothing, or over that of the slowest run, 1 where they share all.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.kernels.multi_query_pool import ValuesFirst
from benchmarks.report import RESULTS, environment, write_rows
from benchmarks.runner import SEED, arguments
from visionattn.probe.heads.banks import HeadSpec, grid
from visionattn.probe.heads.poolings import create_pooling
from visionattn.probe.sweep import hold_out, sweep
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures
from visionattn.probe.tokens.interface import Features, Layer, Tokens

CLASSES, BATCH = 10, 256
TESTS, LIVE_TESTS = 256, 32
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)


@dataclass(frozen=True)
class Case:
    poolings: tuple[str, ...]
    tokens: int = 64
    dim: int = 192
    images: int = 2816
    on_disk: bool = False
    live: str = ""  # a backbone's name
    pixels: int = 128  # per side of its images

    def heads(self) -> list[HeadSpec]:
        return grid(self.poolings, lrs=RATES, seeds=range(32 // (len(RATES) * len(self.poolings))))

    def __str__(self) -> str:
        heads = ", ".join(f"{32 // len(self.poolings)} {name}" for name in self.poolings)
        if self.live:
            return f"live, {self.live} at {self.pixels} pixels, {heads}"
        return f"{'from disk' if self.on_disk else 'in memory'}, {self.tokens} x {self.dim}, {heads}"


MIXED = ("gap", "ep_8", "ep_16", "ep_32")
CASES = [
    Case(("gap",)),
    Case(("ep_8",)),
    Case(("ep_32",)),
    Case(MIXED),
    Case(MIXED, tokens=196, images=1408),
    Case(MIXED, tokens=196, dim=768, images=640),
    Case(("gap", "ep_8"), on_disk=True),
    Case(MIXED, on_disk=True),
    Case(MIXED, images=288, live="vit_tiny_patch16_224"),
    Case(MIXED, images=860, live="tf_efficientnet_lite0"),
    Case(MIXED, images=574, live="tf_efficientnet_lite0", pixels=224),
]


class FileFeatures(Features):
    """Random tokens in a file."""

    def __init__(self, path: Path, case: Case, images: int) -> None:
        generator = np.random.default_rng(SEED)
        shape = (images, case.tokens, case.dim)
        with path.open("wb") as file:
            for _ in range(images):
                generator.standard_normal(shape[1:], dtype=np.float32).astype(np.float16).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        self.path, self.shape, self.on_disk = path, shape, case.on_disk
        self.layers = (Layer("layer", case.dim, (1, case.tokens)),)
        self.labels = torch.arange(images) % CLASSES
        self.classes = tuple(map(str, range(CLASSES)))

    def batches(self, rows: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, list[Tokens]]]:
        if self.on_disk:
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        tokens = np.memmap(self.path, np.float16, "r", shape=self.shape)
        for part in rows.split(batch_size):
            yield part, [Tokens(torch.from_numpy(tokens[part.numpy()]))]


def live_features(case: Case, device: str) -> list[Features]:
    """Random images to train on and to test, as a backbone with random weights sees them."""
    torch.manual_seed(SEED)
    size = {"img_size": case.pixels} if case.live.startswith("vit") else {}
    backbone = Backbone(timm.create_model(case.live, **size).to(device), image_size=case.pixels)
    found: list[Features] = []
    for count in (case.images, LIVE_TESTS):
        labels = torch.arange(count) % CLASSES
        images = TensorDataset(torch.randn(count, 3, case.pixels, case.pixels), labels)
        found.append(LiveFeatures(backbone, images, labels, [str(number) for number in range(CLASSES)]))
    return found


def one_sweep(train: Features, test: Features, heads: list[HeadSpec], device: str) -> None:
    sweep(train, test, heads, epochs=1, batch_size=BATCH, warmup_epochs=0, device=device)


def loop(train: Features, test: Features, name: str, device: str) -> None:
    dim = train.layers[0].dim
    probing = name.startswith("ep_")
    pooling = ValuesFirst(dim, int(name[3:])) if probing else create_pooling(name, dim, train.layers[0].grid)
    head = nn.Sequential(pooling, nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, CLASSES)).to(device)
    optimizer = Lars(head.parameters(), lr=0.1, momentum=0.9, always_adapt=True)
    kept, held = hold_out(train.labels, torch.arange(len(train)), 0.1, 0)
    rows = kept[torch.randperm(len(kept))][: len(kept) // BATCH * BATCH]
    for part, (tokens,) in train.batches(rows, BATCH):
        loss = F.cross_entropy(head(tokens.patches.to(device).float()), train.labels[part].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        for features, chosen in ((train, held), (test, torch.arange(len(test)))):
            for part, (tokens,) in features.batches(chosen, BATCH):
                head(tokens.patches.to(device).float()).argmax(1).cpu().eq(features.labels[part])


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    start, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    function()
    end = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter() - start, end.ru_utime + end.ru_stime - usage.ru_utime - usage.ru_stime


def measure(case: Case, device: str, repeats: int) -> list[dict]:
    heads = case.heads()
    each = len(heads) // len(case.poolings)
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as folder:
        if case.live:
            train, test = live_features(case, device)
        else:
            train, test = (
                FileFeatures(Path(folder) / part, case, n) for part, n in (("train", case.images), ("test", TESTS))
            )
        kinds: dict[str, Callable[[], None]] = {"sweep of 32": partial(one_sweep, train, test, heads, device)}
        for name in case.poolings:
            kinds[f"run of {name}"] = partial(one_sweep, train, test, [HeadSpec(name)], device)
            if not case.live:
                kinds[f"loop of {name}"] = partial(loop, train, test, name, device)
        times: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in kinds}
        for number in range(repeats + 1):
            for kind, function in kinds.items():
                found = seconds(function)
                if number:  # the first round warms up
                    times[kind].append(found)
    for kind in ("run",) if case.live else ("run", "loop"):
        singles = [times[f"{kind} of {name}"] for name in case.poolings]
        times[f"32 {kind}s"] = [tuple(each * sum(clock) for clock in zip(*values)) for values in zip(*singles)]
    against = ["32 runs", "32 loops"]
    if case.live:
        slowest = max(case.poolings, key=lambda name: statistics.median(clock for clock, _ in times[f"run of {name}"]))
        against.append("slowest run")
        times["slowest run"] = times[f"run of {slowest}"]
    common = {
        "images": case.images,
        "batch": BATCH,
        "epochs": 1,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    rows = []
    for kind, values in times.items():
        row: dict = {"case": str(case), "implementation": kind}
        for clock, name in enumerate(("seconds", "cpu_seconds")):
            row[name] = f"{statistics.median(value[clock] for value in values):.3f}"
        for clock, name in enumerate(("share", "cpu_share")):
            shares = [sweep_of_32[clock] / value[clock] for sweep_of_32, value in zip(times["sweep of 32"], values)]
            row[name] = f"{statistics.median(shares):.3f}" if kind in against else ""
        rows.append({**row, **common, **environment(device), "seed": SEED})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="+", choices=[str(case) for case in CASES])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for case in CASES:
        if options.cases is None or str(case) in options.cases:
            rows = measure(case, options.device, options.repeats)
            write_rows(RESULTS / "probe_sweep.csv", rows, key=("case", "device"))
            for row in rows:
                print(
                    *(row[name] for name in ("case", "implementation", "seconds", "cpu_seconds", "share", "cpu_share"))
                )


if __name__ == "__main__":
    main()
