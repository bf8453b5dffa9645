r"""Cost of a mixer: multiply-accumulates, time and peak memory of a layer of ViT-Tiny, by the number of tokens.

Efficiency length: the number of tokens from which a mixer is cheaper than softmax attention. Least squares fit
a L^2 + b L + c to the costs of attention and d L + e to those of the mixer (times without the shortest length); the
efficiency length is the larger root of the difference. It is not reported if the mixer is not cheaper on the largest
measured grid, since a line does not describe its cost then.

Source: CAB, arXiv 2210.07661, which measures 256 to 8,192 tokens.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from visionattn.arena.nets import create_mixer
from visionattn.arena.plan import Found, Plan
from visionattn.mixers import Mixer

__all__ = ["efficiency_length", "paired_times", "peak_memory", "run"]

DIM, HEADS = 192, 3
SLOW = 0.5  # seconds per call from which three rounds suffice
MIB = 2**20


def efficiency_length(
    lengths: Sequence[float], dense: Sequence[float], mixer: Sequence[float], first: int = 0
) -> float:
    """Length from which a linear cost is below a quadratic one; NaN if there is none.

    Args:
        lengths: Numbers of tokens, three or more.
        dense: Costs of softmax attention.
        mixer: Costs of the mixer.
        first: Index of the first length to which the line is fitted: 1 for times.
    """
    if len(lengths) < 3 + first:
        return float("nan")
    a, b, c = np.polyfit(lengths, dense, 2)
    d, e = np.polyfit(lengths[first:], mixer[first:], 1)
    inside = (b - d) ** 2 - 4 * a * (c - e)
    return float((d - b + inside**0.5) / (2 * a)) if a > 0 and inside >= 0 else float("nan")


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise every start and stop is logged to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def paired_times(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of calls, which take turns in every round, so that a disturbance affects all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times):
            found.append(1e3 * _seconds(call, device))
    return times


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def run(name: str, sides: Sequence[int], plan: Plan, device: torch.device) -> list[Found]:
    """Measure a mixer and softmax attention in turn on square grids, one image at a time.

    Larger grids are skipped if a call would take more than `plan.slowest` seconds, or more than half of the memory:
    both are predicted from the previous grid by the multiply-accumulates. Softmax attention itself is never too slow.

    Args:
        name: Name in `MIXERS`.
        sides: Sides of the grids, in increasing order.
        plan: Sizes of the run.
        device: Device of the measurement.
    """

    def outline(side: int) -> Mixer:
        return create_mixer(name, DIM, HEADS, (side, side), small=False, device="meta")

    found = [Found("own parameters", "", float(outline(sides[0]).extra_parameters()))]
    seconds = memory = 0.0  # predicted
    for number, side in enumerate(sides):
        n = side * side
        macs = outline(side).macs(n)
        if number:
            growth = macs / outline(sides[number - 1]).macs(sides[number - 1] ** 2)
            seconds, memory = growth * seconds, growth * memory
        if memory > _memory(device) / 2 or (seconds > plan.slowest and name != "softmax"):
            break
        with torch.inference_mode():
            calls = [_call(kind, side, device) for kind in (name, "softmax")]
            for call in calls:
                call()
            own, softmax = paired_times(calls, plan.rounds if seconds < SLOW else min(plan.rounds, 3), device)
            memory = float(peak_memory(calls[0], device))
        seconds = statistics.median(own) / 1e3
        found += [
            Found("ms", f"N={n}", statistics.median(own)),
            Found("ms of softmax", f"N={n}", statistics.median(softmax)),
            Found("times faster", f"N={n}", statistics.median(b / a for a, b in zip(own, softmax))),
            Found("MiB", f"N={n}", memory / MIB),
            Found("M MACs", f"N={n}", macs / 1e6),
        ]
    return found


def _call(name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    mixer = create_mixer(name, DIM, HEADS, (side, side), small=False).to(device).eval()
    x = torch.randn(1, side * side, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: mixer(x, (side, side))


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return 1024.0 * int(values["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 4.0 * 2**30  # not Linux
