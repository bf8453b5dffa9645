"""Run a file at several sizes and batches, compare with its metadata, and measure the cost; in separate processes."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import visionattn_runtime
from visionattn.errors import InputError, shorten
from visionattn.export.inspect.structure import Structure, Value
from visionattn.export.spec import ExportSpec, size_text

__all__ = ["Cost", "Run", "find_runs", "measure_cost", "own_size"]

GUESSES = (224, 256, 64, 32)  # sides to try if a file states no size
BATCHES = (1, 3)
TIMED = 1.0  # seconds of runs for the median latency
MOST_SECONDS = 300  # time limit of a process
LARGEST_SIDE = 2**14
# Allowed difference between an image alone and in a batch, relative to the largest output: sums have another order.
SAME = 1e-3
_NUMPY = {"float": "float32", "double": "float64", "float16": "float16"}


@dataclass(frozen=True)
class Run:
    """A run with random images.

    Attributes:
        height: Height of the images.
        width: Width of the images.
        batch: Batch size.
        stated: Whether the file's metadata allow this size.
        outputs: Shapes of the outputs; empty if it failed.
        fault: Why it failed, that an output is not finite, or that an image gives another output in a batch than alone;
            empty if there is no fault.
    """

    height: int
    width: int
    batch: int
    stated: bool
    outputs: list[list[int]]
    fault: str = ""

    def __str__(self) -> str:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in self.outputs)
        return f"{size_text(self.height, self.width)}, batch {self.batch}: {self.fault or f'output {shapes}'}"


@dataclass(frozen=True)
class Cost:
    """Cost of a run with one image at the file's own size.

    Attributes:
        threads: Number of threads.
        milliseconds: Median time; for one thread it is CPU time, which other processes affect less.
        spread: Half the interquartile range.
        runs: Number of timed runs.
        peak_bytes: Peak memory of loading and running, beyond that of an empty process; 0 if the system does not report
            it.
    """

    threads: int
    milliseconds: float
    spread: float
    runs: int
    peak_bytes: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{threads}: {self.milliseconds:.2f} ms (spread {self.spread:.2f}, {self.runs} runs), "
            f"{self.peak_bytes / 2**20:.0f} MiB"
        )


def image_inputs(structure: Structure) -> list[Value]:
    """The inputs that are images.

    Raises:
        InputError: There are none.
    """
    found = [value for value in structure.inputs if value.layout]
    if not found:
        stated = "; ".join(map(str, structure.inputs)) or "none"
        raise InputError(
            f"The file has no image input (4 axes, with 1, 3 or 4 channels), so it was not run; its inputs are "
            f"{shorten(stated)}."
        )
    return found


def _axes(value: Value) -> tuple[int | str, int | str, int | str]:
    """Batch, height and width as a file states them."""
    shape: Any = value.shape
    return (shape[0], *(shape[2:] if value.layout == "NCHW" else shape[1:3]))


def own_size(
    path: Path, structure: Structure, spec: ExportSpec | None, asked: tuple[int, int] | None
) -> tuple[int, int]:
    """The size of the first run: the requested one, that of the file or its metadata, or the first guess that runs.

    Raises:
        InputError: No guess runs, or the file does not take the requested size.
    """
    batch, *fixed = _axes(image_inputs(structure)[0])
    stated = asked or (spec and tuple(spec.input_size[1:])) or (None, None)
    sides = [own if isinstance(own, int) else side for own, side in zip(fixed, stated)]
    if asked and list(asked) != sides:
        raise InputError(f"The image size of this file must be {' x '.join(map(str, fixed))}: leave out --image-size.")
    if None not in sides:
        return sides[0], sides[1]  # type: ignore[return-value]
    guesses = [(sides[0] or guess, sides[1] or guess) for guess in GUESSES]
    found = _try(path, structure, spec, [(*guess, batch if isinstance(batch, int) else 1) for guess in guesses])
    for guess, result in zip(guesses, found):
        if "error" not in result:
            return guess
    reason = found[0]["error"].rstrip(".") if found else "the process ended"
    raise InputError(
        f"The file states no image size and does not run at any of {', '.join(map(str, GUESSES))} pixels: give one "
        f"with --image-size H W. Reason: {shorten(reason)}."
    )


def find_runs(path: Path, structure: Structure, spec: ExportSpec | None, size: tuple[int, int]) -> list[Run]:
    """Run a file at its own size and, on dynamic axes, at others; with one image and with three.

    The other sizes are a multiple of 32 near 1.5 and 0.75 times the size, and primes near 0.6 and 1.6 times, which are
    not divisible by any window or patch. Sizes outside of a multiple or minimum in the metadata may fail.
    """
    batch, *sides = _axes(image_inputs(structure)[0])
    trials = []
    for height, width in _sizes(size, sides):
        count = [batch] if isinstance(batch, int) else BATCHES
        trials += [(height, width, number) for number in count]
    found = _try(path, structure, spec, trials)
    runs = []
    for (height, width, number), result in zip(trials, found):
        fault, outputs = result.get("error", ""), result.get("shapes", [])
        if not fault and not result["finite"]:
            fault = "an output contains NaN or infinite values"
        elif not fault and (result["differs"] or 0) > SAME * max(result["largest"], 1e-6):
            fault = f"the output for the first of {number} images differs from that of the image alone by "
            fault += f"{result['differs']:.2g}"
        runs.append(Run(height, width, number, _is_stated(spec, height, width), outputs, fault))
    if len(found) < len(trials):
        height, width, number = trials[len(found)]
        fault = f"the process ended or exceeded {MOST_SECONDS} s: out of memory, or a crash of ONNX Runtime"
        runs.append(Run(height, width, number, _is_stated(spec, height, width), [], fault))
    return runs


def measure_cost(
    path: Path, structure: Structure, spec: ExportSpec | None, size: tuple[int, int], threads: Sequence[int]
) -> list[Cost]:
    """Time and memory of a run with one image, for each number of threads with which it runs."""
    batch = _axes(image_inputs(structure)[0])[0]
    number = batch if isinstance(batch, int) else 1
    costs = []
    for count in threads:
        lines = _trial(path, structure, spec, [(*size, number)], count, TIMED)
        if len(lines) < 2 or "error" in lines[0]:
            continue
        seconds = lines[0]["seconds"][1:] or lines[0]["seconds"]  # the first pass allocates and prepares
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        median = statistics.median(seconds)
        memory = int(lines[1]["memory"]["peak"])
        costs.append(Cost(count, 1000 * median, 500 * (high - low), len(seconds), memory))
    return costs


def _sizes(size: tuple[int, int], stated: Sequence[int | str]) -> list[tuple[int, int]]:
    """The file's own size and, on dynamic axes, three others."""
    free = [isinstance(side, str) for side in stated]
    others = [
        tuple(change(side, factor) if dynamic else side for side, factor, dynamic in zip(size, factors, free))
        for change, factors in ((_rounded, (1.5, 0.75)), (_prime, (1.6, 0.6)), (_prime, (0.6, 1.6)))
    ]
    return list(dict.fromkeys([size, *others]))  # type: ignore[list-item]


def _rounded(side: int, factor: float) -> int:
    return 32 * max(1, round(side * factor / 32))


def _prime(side: int, factor: float) -> int:
    side = max(2, round(side * factor))
    while any(side % divisor == 0 for divisor in range(2, math.isqrt(side) + 1)):
        side += 1
    return side


def _is_stated(spec: ExportSpec | None, height: int, width: int) -> bool:
    if spec is None:
        return True
    try:
        spec.check_size(height, width)
    except InputError:
        return False
    return True


def _try(
    path: Path, structure: Structure, spec: ExportSpec | None, trials: Sequence[tuple[int, int, int]]
) -> list[dict[str, Any]]:
    lines = _trial(path, structure, spec, trials, 1, 0)
    if lines and "error" in lines[0] and len(lines) == 1 < len(trials):
        return lines * len(trials)  # it does not load
    return [line for line in lines if "memory" not in line][: len(trials)]


def _trial(
    path: Path,
    structure: Structure,
    spec: ExportSpec | None,
    trials: Sequence[tuple[int, int, int]],
    threads: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Run `visionattn_runtime.trial` and return its output lines, fewer if it crashed."""
    if any(max(trial) > LARGEST_SIDE for trial in trials):
        raise InputError(f"Height and width must be at most {LARGEST_SIDE}.")
    inputs = [_inputs(structure, spec, *trial) for trial in trials]
    plan = {"file": str(path.resolve()), "threads": threads, "seconds": seconds, "trials": inputs}
    command = [sys.executable, "-m", "visionattn_runtime.trial", json.dumps(plan)]
    root = Path(visionattn_runtime.__file__).parents[1]
    try:
        output = subprocess.run(command, cwd=root, capture_output=True, timeout=MOST_SECONDS).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    lines = output.decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _inputs(structure: Structure, spec: ExportSpec | None, height: int, width: int, batch: int) -> dict[str, Any]:
    """The type, shape and range of each input, images first."""
    images = image_inputs(structure)
    found: dict[str, Any] = {}
    low, high = _range(spec)
    for value in [*images, *(value for value in structure.inputs if value not in images)]:
        shape: list[Any] = list(value.shape or [])
        if value.layout:
            channels = shape[1] if value.layout == "NCHW" else shape[3]
            shape = [batch, channels, height, width] if value.layout == "NCHW" else [batch, height, width, channels]
        else:
            shape = [side if isinstance(side, int) else 1 for side in shape]
        found[value.name] = {"type": _NUMPY.get(value.type, value.type), "shape": shape, "range": [low, high]}
    return found


def _range(spec: ExportSpec | None) -> tuple[float, float]:
    """A range of values that preprocessed images can have in every channel."""
    if spec is None:
        return 0.0, 1.0
    (low, high), means, stds = spec.input_range, spec.mean or [0.0], spec.std or [1.0]
    return max((low - m) / s for m, s in zip(means, stds)), min((high - m) / s for m, s in zip(means, stds))
