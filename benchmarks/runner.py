"""What operator benchmarks share: values checked before the clock runs, paired rounds, memory, rows.

Every implementation is a function that builds a `Problem`: a module, its inputs and the gradient of a loss by its
output. One call is either `inference`, the output alone, or a `training step`, the output and its gradients by inputs
and parameters. Nothing is timed before outputs and gradients agree with the plain definition, computed in float64 from
the same numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.report import environment, paired_milliseconds, summarize

SEED = 0
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
INFERENCE, TRAINING = PASSES = ("inference", "training step")


class Problem(NamedTuple):
    """A module, its inputs and the gradient of a loss by its output."""

    module: nn.Module
    inputs: list[Tensor]
    cotangent: Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute something.

    Args:
        build: Gives the problem of a case in a dtype on a device. It can be pickled, and gives the same numbers in
            every process.
        definition: Builds the plain definition of the same.
        no_training: Why there is no training step; empty if there is one.
    """

    build: Callable[[Any, torch.dtype, str], Problem]
    definition: Callable[[Any, torch.dtype, str], Problem]
    no_training: str = ""


def arguments(description: str) -> argparse.ArgumentParser:
    """Make the command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run(problem: Problem, mode: str) -> list[Tensor]:
    """Make one call: the output, in a training step followed by all gradients."""
    module, inputs, cotangent = problem
    module.train(mode == TRAINING)
    if mode == INFERENCE:
        with torch.inference_mode():
            return [module(*inputs)]
    out = module(*inputs)
    leaves = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


def measure(
    op: str,
    case: Any,
    implementations: dict[str, Implementation],
    baseline: str,
    dtype: torch.dtype,
    tolerance: float,
    device: str,
    repeats: int,
    first_case: Any = None,
) -> list[dict]:
    """Measure the implementations of one case, print the rows and give them.

    Columns: `peak_mib` of `_peaks_mib`, and, of a training step, `saved_mib` of `saved_mib`.

    Args:
        op: Name for the column of that name.
        case: What the implementations build; `str(case)` is the column's text.
        implementations: Name -> implementation.
        baseline: The one whose time the column `ratio` divides by the others'.
        dtype: Of inputs and parameters.
        tolerance: Allowed error, as a share of the largest magnitude of each tensor.
        device: Where to work. On CPUs, one thread does.
        repeats: Rounds. With 0 nothing is checked or timed, and memory alone is measured.
        first_case: What is called before memory is measured: `case` itself if None. A smaller one saves time, but not
            where the first call of a size compiles something.

    An implementation whose values are wrong, or for which memory does not suffice, is said to be left out.

    Raises:
        SystemExit: So is the baseline.
    """
    _settle(device)
    torch.compiler.reset()  # forms compiled for earlier cases count towards a limit, past which nothing is compiled
    kind = str(dtype).removeprefix("torch.")
    peaks = {}
    for name, implementation in implementations.items():
        modes = PASSES[:1] if implementation.no_training else PASSES
        if implementation.no_training:
            print(f"{case}, {kind}, {TRAINING}: without {name}, {implementation.no_training}", flush=True)
        peaks[name] = _peaks_mib(implementation, modes, first_case or case, case, dtype, device)
        for mode in modes:
            if mode not in peaks[name]:
                print(f"{case}, {kind}, {mode}: without {name}, memory does not suffice", flush=True)

    problems = {name: implementations[name].build(case, dtype, device) for name in implementations if peaks[name]}
    if repeats:
        for definition in dict.fromkeys(implementations[name].definition for name in problems):
            for mode in PASSES:
                expected = run(_doubled(definition(case, dtype, device)), mode)
                for name, problem in problems.items():
                    if implementations[name].definition != definition or mode not in peaks[name]:
                        continue
                    error = _error(run(problem, mode), expected)
                    if not error <= tolerance:
                        print(f"{case}, {kind}, {mode}: without {name}, whose error is {error:.1e}", flush=True)
                        del peaks[name][mode]

    origin, rows = environment(device), []
    for mode in PASSES:
        calls = {name: _call(problem, mode) for name, problem in problems.items() if mode in peaks[name]}
        if baseline not in calls:
            raise SystemExit(f"{op}, {case}, {kind}, {mode}: nothing is timed without {baseline}.")
        columns = {name: {"median_ms": "", "iqr_ms": "", "ratio": ""} for name in calls}
        if repeats:  # the check was a first call
            columns = summarize(paired_milliseconds(calls, device, repeats, warm_up=0), baseline)
        for name in calls:
            row = {
                "op": op,
                "pass": mode,
                "case": str(case),
                "dtype": kind,
                "implementation": name,
                **columns[name],
                "peak_mib": f"{peaks[name][mode]:.1f}",
                "saved_mib": f"{saved_mib(problems[name]):.1f}" if mode == TRAINING else "",
                "threads": torch.get_num_threads(),
                **origin,
                "seed": SEED,
            }
            rows.append(row)
            print(*(row[key] for key in list(row)[1:10]), sep=" | ", flush=True)
    return rows


def saved_mib(problem: Problem) -> float:
    """Memory that autograd keeps for the backward pass, in MiB: each storage once, without inputs and parameters."""
    module, inputs, _ = problem
    module.train()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(*inputs)  # alive until storages are counted, so that none is used again
    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *module.parameters(), *module.buffers())}
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in given]
    del out
    return sum(sizes) / 2**20


def _settle(device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in convolutions, as it does in matrix products


def _call(problem: Problem, mode: str) -> Callable[[], list[Tensor]]:
    return lambda: run(problem, mode)


def _doubled(problem: Problem) -> Problem:
    inputs = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in problem.inputs]
    return Problem(problem.module.double(), inputs, problem.cotangent.double())


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a tensor as a share of its largest magnitude; NaN if there is one."""
    pairs = zip(found, expected, strict=True)
    shares = [(tensor.double() - reference).abs().max() / reference.abs().max() for tensor, reference in pairs]
    return torch.stack(shares).max().item()


def _peaks_mib(
    implementation: Implementation, modes: tuple[str, ...], first_case: Any, case: Any, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Peak memory of one call in MiB, above what was held before it: its result and all that comes and goes.

    A first call, so that libraries are loaded and forms compiled, is not measured. On CUDA: the most that PyTorch had
    allocated. On CPU, under Linux: the most that was resident in a process of its own for each implementation, started
    by a server that has imported the packages and nothing else. There each tensor of 64 KiB or more goes back to the
    system when it is freed, so that gaps in the heap do not count. Before the measured call the recorded peak is reset.
    (`ru_maxrss` would not do: a process inherits that of the one before it.)

    Returns:
        Pass -> MiB, without a pass for which memory does not suffice.
    """
    peaks: dict[str, float] = {}
    if device == "cpu":
        context = get_context("forkserver")
        context.set_forkserver_preload(["timm", "visionattn"])
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            for mode in modes:
                try:
                    peaks[mode] = pool.submit(_peak_on_cpu, implementation, mode, first_case, case, dtype).result()
                except RuntimeError as error:
                    if "allocate memory" not in str(error):
                        raise
        return peaks
    for mode in modes:
        try:
            run(implementation.build(first_case, dtype, device), mode)
            problem = implementation.build(case, dtype, device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(problem, mode)
            peaks[mode] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    return peaks


def _peak_on_cpu(implementation: Implementation, mode: str, first_case: Any, case: Any, dtype: torch.dtype) -> float:
    _settle("cpu")
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    problem = implementation.build(first_case, dtype, "cpu")
    run(problem, mode)
    if first_case != case:
        problem = implementation.build(case, dtype, "cpu")
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    # A machine that runs out of memory crawls: a call that needs nearly all that is free fails instead.
    limit = _kibibytes("self/status", "VmData") + 0.8 * _kibibytes("meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit) * 1024, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    before = _kibibytes("self/status", "VmRSS")
    run(problem, mode)
    return (_kibibytes("self/status", "VmHWM") - before) / 1024


def _kibibytes(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (Path("/proc") / path).read_text(), re.MULTILINE)
    assert found
    return int(found[1])
