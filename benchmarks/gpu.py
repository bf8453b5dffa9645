"""Every Triton kernel on a GPU: its values against float64, then its times compared with what users would use instead.

    python -m benchmarks.gpu [--families NAME ...] [--reference FOLDER] [--repeats 20] [--again]

One command. A family is an operator or whole networks, and takes some minutes. Outputs and all gradients of an operator
are compared with its plain definition in float64, in float32, bfloat16 and float16, at shapes of real models and at odd
ones, with all fresh memory full of NaN. Rows go to results/gpu_checks.csv: `error` is the largest of a tensor, as a
share of its largest magnitude or of 1 where that is less, beside what the operator's file allows. Columns that are True
where the check holds, or name what was raised:

    passed         the error is allowed
    deterministic  a second call gives the same bits
    graph          a replayed CUDA graph of the forward pass does too
    checkpointed   and so does torch.utils.checkpoint
    strided        the error is allowed where no tensor is contiguous
    compiled       and in a graph of torch.compile(fullgraph=True)
    autocast       and under autocast, with all tensors but the first in float32
    second_device  and on cuda:1 while cuda:0 is the current device

What passes is timed by the operator's own script, which writes its CSV. An operator whose checks of this revision and
device stand in the table is not checked again, unless told so. Then networks are timed by
benchmarks/models/networks.py, a family each. FOLDER is a checkout of MatchStereo's repository, for the authors' forms
of match attention.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import visionattn.kernels  # noqa: F401  registers the operators
from benchmarks.report import RESULTS, environment, read_rows, write_rows
from visionattn.kernels import decompositions, kernels_enabled

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
STRICTER = {"symmetric_gate": 1e-6}  # in float32
LOOSER = {"subspace_attention": 2e-5}
SECONDS = 420  # of a family's timings
CHECKS = ("passed", "deterministic", "graph", "checkpointed", "strided", "compiled", "autocast", "second_device")
NOT_RUN = "not run"

Draw = Callable[..., Tensor]  # shape -> random numbers of the case's dtype, which require a gradient


def symmetric_gate(draw: Draw) -> Iterator[tuple]:
    for shape in ((1, 48, 720, 1280), (16, 48, 64, 64), (3, 5, 401), (1,)):
        yield draw(*shape), draw(*shape)
    yield draw(2, 48, 63, 65).to(memory_format=torch.channels_last), draw(2, 48, 63, 65)


def halo_attention(draw: Draw) -> Iterator[tuple]:
    for heads, D, Dv, size, block, halo, stride, border, index in (
        (4, 16, 16, (56, 56), 8, 3, 1, "mask", "offset"),
        (8, 8, 8, (56, 56), 8, 3, 1, "mask", "offset"),
        (4, 32, 32, (33, 47), 8, 3, 1, "mask", "offset"),
        (2, 64, 64, (24, 24), 8, 4, 1, "mask", "offset"),
        (2, 24, 40, (30, 20), 10, 3, 1, "mask", "offset"),
        (2, 128, 128, (16, 16), 8, 3, 1, "mask", "offset"),
        (4, 16, 16, (28, 42), 14, 2, 1, "mask", "offset"),
        (4, 16, 64, (32, 32), 8, 2, 1, "zero", "timm"),
        (4, 16, 32, (32, 31), 8, 2, 2, "zero", "timm"),
        (4, 16, 16, (32, 31), 8, 3, 2, "mask", "offset"),
    ):
        H, W = size
        window = block + 2 * halo
        q = draw(2, heads, D, -(-H // stride), -(-W // stride))
        k, v = draw(2, heads, D, H, W), draw(2, heads, Dv, H, W)
        tables = [0.3 * draw(2 * window - 1, D) for _ in range(2)]
        yield q, k, v, *tables, block, halo, stride, border, index


def match_attention(draw: Draw) -> Iterator[tuple]:
    for size, heads, D, Dv, shared, radius, similarity, reach in (
        ((48, 104), 4, 8, 8, False, 1, "l1", 8),
        ((48, 104), 4, 8, 16, True, 1, "l1", 8),
        ((24, 52), 4, 16, 16, False, 1, "l1", 4),
        ((24, 52), 4, 32, 32, False, 2, "l1", 4),
        ((12, 26), 4, 40, 40, True, 2, "l1", 200),
        ((9, 11), 3, 5, 7, False, 1, "dot", 2),
        ((9, 11), 2, 12, 12, False, 3, "l1", 2),
    ):
        q, k, v = (draw(2, *size, heads, width) for width in (D, D, Dv))
        field = reach * draw(2, *size, 1 if shared else heads, 2).float()
        yield q, k, v, field, radius, similarity


def multi_query_pool(draw: Draw) -> Iterator[tuple]:
    for B, N, D, M in ((64, 197, 768, 32), (16, 257, 1536, 32), (33, 196, 384, 96), (5, 7, 72, 3), (1, 1000, 192, 1)):
        yield draw(B, N, D), draw(M, D), None
    present = draw(9, 50) > 0
    present[0] = False
    yield draw(9, 50, 192), draw(8, 192), present
    for B, N, D, M in ((64, 197, 768, 32), (5, 7, 72, 3)):
        tokens = (40 * draw(B, N, D)).clamp(-127, 127).to(torch.int8)
        yield tokens, draw(M, D), None, draw(B, N).detach().abs().half() / 40


def subspace_attention(draw: Draw) -> Iterator[tuple]:
    for B, g, width, H, W, form in (
        (16, 4, 128, 14, 14, "paper"),
        (8, 4, 16, 56, 56, "paper"),
        (4, 4, 24, 28, 31, "all"),
        (4, 8, 12, 7, 7, "all"),
        (2, 1, 5, 112, 3, "all"),
    ):
        C = g * width
        x, scale, point = draw(B, C, H, W), 0.3 * draw(C), draw(g, width)
        if form == "paper":
            yield x, scale, None, point, None, None, None, False, False, 0.0
        else:
            yield x, scale, draw(C), point, draw(g), draw(g), draw(g), True, True, 1e-5


CASES = {case.__name__: case for case in (symmetric_gate, halo_attention, match_attention, multi_query_pool)}
CASES[subspace_attention.__name__] = subspace_attention
# The commands that time a family.
TIMINGS = {
    "symmetric_gate": ["kernels.symmetric_gate"],
    "halo_attention": ["kernels.halo_attention", "--parts", "layer"],
    "match_attention": ["kernels.match_attention", "--size", "1536x1536"],
    "multi_query_pool": ["kernels.multi_query_pool"],
    "subspace_attention": ["kernels.subspace_attention"],
    "halonet": ["models.networks", "--parts", "halonet"],
    "accelerate": ["models.networks", "--parts", "accelerate"],
    "match_stereo": ["models.networks", "--parts", "match_stereo"],
    "span": ["models.networks", "--parts", "span"],
}


def differentiate(
    function: Callable, args: tuple, cotangents: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of all arguments that require one, and the cotangents: random ones if None."""
    args = each(args, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))
    outputs = function(*args)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if cotangents is None:
        cotangents = [torch.randn_like(out) for out in outputs]
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, [g.to(out) for g, out in zip(cotangents, outputs)])
    return [out.detach() for out in outputs] + list(gradients), cotangents


def each(args: tuple, function: Callable[[Tensor], Tensor]) -> tuple:
    """Arguments with a function applied to each tensor."""
    return tuple(function(arg) if isinstance(arg, Tensor) else arg for arg in args)


def cast(args: tuple, dtype: torch.dtype) -> tuple:
    return each(args, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, others between them."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def compiled(operator: Callable) -> Callable:
    torch.compiler.reset()  # earlier cases count towards a limit, past which nothing is compiled
    return torch.compile(lambda *args: operator(*args), fullgraph=True)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a tensor as a share of its largest magnitude, or of 1; NaN if there is one."""
    shares = [
        ((tensor.to(reference) - reference).abs().max() / reference.abs().max().clamp(min=1)).item()
        for tensor, reference in zip(found, expected, strict=True)
    ]
    return float("nan") if any(share != share for share in shares) else max(shares)


def same(found: list[Tensor], again: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@torch.inference_mode()
def captured(operator: Callable, args: tuple) -> list[Tensor]:
    """What a CUDA graph of the operator gives when it is replayed over memory full of NaN."""
    operator(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = operator(*args)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    for out in outputs:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return outputs


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that PyTorch allocates without writing to it with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def describe(args: tuple) -> str:
    return " ".join("x".join(map(str, arg.shape)) if isinstance(arg, Tensor) else str(arg) for arg in args)


def outcome(check: Callable[[], bool]) -> str:
    """Whether a check holds, or what it raised: a failing one must not cost the rows of the others."""
    try:
        return str(check())
    except Exception as error:
        traceback.print_exc()
        return type(error).__name__


def examine(operator: Callable, definition: Callable, args: tuple, dtype: torch.dtype, allowed: float) -> dict:
    """The columns of a case."""
    with poisoned_memory():
        found, cotangents = differentiate(operator, args, None)
    expected, _ = differentiate(definition, cast(args, torch.float64), cotangents)
    worst = error(found, expected)

    def equal(function: Callable) -> bool:
        return same(found, differentiate(function, args, cotangents)[0])

    def close(function: Callable, args: tuple) -> bool:
        return error(differentiate(function, args, cotangents)[0], expected) <= allowed

    checks = {
        "passed": lambda: worst <= allowed,
        "deterministic": lambda: equal(operator),
        "graph": lambda: same(found[: len(cotangents)], captured(operator, args)),
        "checkpointed": lambda: equal(partial(checkpoint, operator, use_reentrant=False)),
        "strided": lambda: close(operator, each(args, strided)),
        "compiled": lambda: close(compiled(operator), args),
    }
    if dtype != torch.float32:
        mixed = (args[0], *cast(args[1:], torch.float32))
        checks["autocast"] = lambda: close(torch.autocast("cuda", dtype)(operator), mixed)
    if torch.cuda.device_count() > 1:
        checks["second_device"] = lambda: close(operator, each(args, lambda tensor: tensor.to("cuda:1")))
    with poisoned_memory():
        outcomes = {name: outcome(checks[name]) if name in checks else NOT_RUN for name in CHECKS}
    return {"case": describe(args), "error": f"{worst:.2e}", "allowed": f"{allowed:.0e}", **outcomes}


def check(name: str, origin: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of an operator's cases."""
    operator = getattr(torch.ops.visionattn, name)
    definition = decompositions()[operator.default]
    for dtype, allowed in TOLERANCES.items():
        if dtype == torch.float32:
            allowed = STRICTER.get(name, LOOSER.get(name, allowed))
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype=dtype, generator=generator) -> Tensor:
            return torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()

        for args in CASES[name](draw):
            columns = examine(operator, definition, args, dtype, allowed)
            yield {"operator": name, "dtype": str(dtype).removeprefix("torch."), **columns, **origin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(TIMINGS), default=list(TIMINGS))
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="checkout of MatchStereo's repository")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="check what has been checked, too")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not kernels_enabled(torch.device("cuda", 0)):
        raise SystemExit("No GPU here that runs the kernels: see visionattn.kernels.kernels_enabled.")
    torch.manual_seed(0)
    failed = []
    for name in args.families:
        if name in CASES and not checked(name, args.again):
            failed.append(name)
            continue
        script, *rest = TIMINGS[name]
        command = [sys.executable, "-m", f"benchmarks.{script}", *rest, "--device", "cuda"]
        command += ["--repeats", str(args.repeats)]
        if args.reference and name.startswith("match"):
            command += ["--reference", str(args.reference)]
        try:
            subprocess.run(command, check=True, timeout=SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as stop:
            failed.append(f"{name} ({type(stop).__name__})")
    if failed:
        raise SystemExit(f"Wrong, or not timed: {', '.join(failed)}.")


def checked(name: str, again: bool) -> bool:
    """Check an operator, unless its rows are in the table, and return whether all checks hold."""
    table, origin = RESULTS / "gpu_checks.csv", environment("cuda")
    rows = [
        row
        for row in read_rows(table)
        if all(row[key] == value for key, value in {"operator": name, **origin}.items() if key != "date")
    ]
    if again or not rows:
        rows = []
        for row in check(name, origin):
            print(*list(row.values())[: -len(origin)], sep=" | ", flush=True)
            rows.append(row)
        write_rows(table, rows, key=("operator", "device"))
    return all(row[column] in ("True", NOT_RUN) for row in rows for column in CHECKS)


if __name__ == "__main__":
    main()
