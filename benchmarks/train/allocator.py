"""CPU time and memory of training steps and of inference, with glibc's malloc as it is and after `keep_freed_memory`.

    python -m benchmarks.train.allocator [--cases NAME ...] [--rounds 3] [--steps 4]

Each run is a process of its own, with one thread; runs with and without the setting take turns. Seconds are CPU time
of the process, user and system, per step after two that are not counted; the ratio is the median over pairs of runs, of
the time as it is over that with the setting. Memory is the process's highest, after half of the steps and after all of
them. The cases named `sizes` take another image size in each of 18 steps. Writes results/allocator.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401  (registers the models)
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.allocator import keep_freed_memory

__all__ = ["CASES"]

WARM_UP, VARIED_STEPS = 2, 18
SIZES = range(128, 289, 32)

Step = Callable[[], object]


def classify(name: str, batch: int, size: int, channels_last: bool = False) -> Step:
    """A training step of a classifier, with AdamW."""
    return varied(name, batch, (size,), channels_last)


def varied(name: str, batch: int, sizes: tuple[int, ...], channels_last: bool = False) -> Step:
    """A training step of a classifier, each with one of the image sizes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name, num_classes=10).train().to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters())
    chosen = random.Random(0)

    def step() -> None:
        size = chosen.choice(sizes)
        images = torch.randn(batch, 3, size, size).to(memory_format=layout)
        loss = F.cross_entropy(model(images), torch.zeros(batch, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def fields(name: str, batch: int, size: tuple[int, int]) -> Step:
    """A training step of a stereo model, by the sum of its predicted fields."""
    model = timm.create_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        found = model(torch.rand(batch, 3, *size), torch.rand(batch, 3, *size))
        loss = sum(part.float().mean() for part in tensors(found) if part.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def tensors(found: object) -> Iterator[torch.Tensor]:
    """The tensors of an output."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from tensors(part)


def restore(name: str, batch: int, size: int) -> Step:
    """A training step of super-resolution on crops, in channels_last as in the recipe."""
    model = timm.create_model(name).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        found = model(torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last))
        optimizer.zero_grad()
        (found - 0.5).abs().mean().backward()
        optimizer.step()

    return step


def infer(name: str, *shape: int, images: int = 1) -> Step:
    """Inference."""
    model = timm.create_model(name).eval()

    def step() -> None:
        with torch.inference_mode():
            model(*(torch.rand(shape) for _ in range(images)))

    return step


CASES: dict[str, tuple[str, Callable[[], Step]]] = {
    "test_resnet": ("training, 128 x 32 px", lambda: classify("test_resnet", 128, 32)),
    "va_mobilenetv2_ulsam_050_32": (
        "training, 128 x 32 px",
        lambda: classify("va_mobilenetv2_ulsam_050_32", 128, 32, channels_last=True),
    ),
    "va_halonet_nano_32": ("training, 128 x 32 px", lambda: classify("va_halonet_nano_32", 128, 32, True)),
    "va_minimal_vit_tiny_patch16_224": (
        "training, 16 x 224 px",
        lambda: classify("va_minimal_vit_tiny_patch16_224", 16, 224),
    ),
    "resnet18": ("training, 16 x 224 px", lambda: classify("resnet18", 16, 224)),
    "mobilenetv3_small_100": ("training, 32 x 224 px", lambda: classify("mobilenetv3_small_100", 32, 224)),
    "efficientnet_lite0": ("training, 16 x 224 px", lambda: classify("efficientnet_lite0", 16, 224)),
    "va_span_ch26_x4": ("training, 16 x 32 px", lambda: restore("va_span_ch26_x4", 16, 32)),
    "va_match_stereo_nano": ("training, 2 x 192 x 384 px", lambda: fields("va_match_stereo_nano", 2, (192, 384))),
    "resnet18, sizes": ("training, 8 x 128 to 288 px", lambda: varied("resnet18", 8, tuple(SIZES))),
    "mobilenetv3_small_100, sizes": (
        "training, 16 x 128 to 288 px",
        lambda: varied("mobilenetv3_small_100", 16, tuple(SIZES)),
    ),
    "va_span_ch26_x4, inference": ("upscale, 320 x 240 px", lambda: infer("va_span_ch26_x4", 1, 3, 240, 320)),
    "va_match_stereo_nano, inference": (
        "stereo, 640 x 384 px",
        lambda: infer("va_match_stereo_nano", 1, 3, 384, 640, images=2),
    ),
    "efficientnet_lite0, inference": ("probe, 32 x 224 px", lambda: infer("efficientnet_lite0", 32, 3, 224, 224)),
    "vit_small_patch16_224, inference": ("probe, 16 x 224 px", lambda: infer("vit_small_patch16_224", 16, 3, 224, 224)),
}


def highest() -> float:
    """The process's peak memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case: str, keep: bool, steps: int, results: multiprocessing.SimpleQueue) -> None:
    """Run one process: seconds per step, and peak memory after half of the steps and after all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if keep and not keep_freed_memory():
        raise SystemExit("malloc here is not glibc's, or is set up by the environment.")
    before = highest()
    step = CASES[case][1]()
    seconds, half = [], 0.0
    for number in range(WARM_UP + steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
        if number == (WARM_UP + steps) // 2:
            half = highest()
    results.put((statistics.mean(seconds[WARM_UP:]), half - before, highest() - before))


def run(case: str, keep: bool, steps: int) -> tuple[float, float, float]:
    """`measure` in a new process."""
    context = multiprocessing.get_context("fork")  # all runs start from the same imports
    results = context.SimpleQueue()
    process = context.Process(target=measure, args=(case, keep, steps, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{case} ended with exit code {process.exitcode}.")
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    origin = environment("cpu")  # before rows change the checkout
    for case in args.cases:
        steps = VARIED_STEPS if case.endswith("sizes") else args.steps
        found: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
        for _ in range(args.rounds):
            for keep, runs in found.items():
                runs.append(run(case, keep, steps))
        plain, kept = (list(zip(*runs)) for runs in found.values())
        row = {
            "model": case,
            "work": CASES[case][0],
            "seconds_default": f"{statistics.median(plain[0]):.3f}",
            "seconds_kept": f"{statistics.median(kept[0]):.3f}",
            "ratio": f"{statistics.median(a / b for a, b in zip(plain[0], kept[0])):.2f}",
            "mib_default_half": f"{max(plain[1]):.0f}",
            "mib_default": f"{max(plain[2]):.0f}",
            "mib_kept_half": f"{max(kept[1]):.0f}",
            "mib_kept": f"{max(kept[2]):.0f}",
            "rounds": args.rounds,
            "steps": steps,
            **origin,
        }
        print(row, flush=True)
        write_rows(RESULTS / "allocator.csv", [row], key=("model",))


if __name__ == "__main__":
    main()
