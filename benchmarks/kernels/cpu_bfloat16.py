"""Operators and accelerated layers in bfloat16 on a CPU, compared with their plain definitions and timm's layers.

    python -m benchmarks.kernels.cpu_bfloat16 [--parts multi_query_pool accelerate ...]

Writes results/cpu_bfloat16.csv, part by part, at shapes of the operators' own benchmarks with few images. One thread
works; its time is that which it worked, so that other work on the machine counts less. Values are checked by the
operators' tests.

The definition of multi_query_pool rounds its logits to bfloat16, which the operator does not: beside it stands the
definition in float32, which rounds its output alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
from torch import Tensor, nn

from benchmarks.kernels import halo_attention, match_attention, multi_query_pool, subspace_attention, symmetric_gate
from benchmarks.report import RESULTS, environment, summarize, write_rows
from benchmarks.runner import INFERENCE, PASSES, SEED, Problem, run
from visionattn.blocks import SubspaceAttention
from visionattn.kernels import PlainForms
from visionattn.surgery import accelerate

BASELINE = "definition"
BFLOAT16 = (torch.bfloat16, "cpu")
Case = tuple[str, torch.dtype, dict[str, Problem], tuple[str, ...]]


class WidenedDefinition(multi_query_pool.Definition):
    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        return super().forward(tokens.float(), queries.float()).to(tokens.dtype)


class ByDefinition(SubspaceAttention):
    def forward(self, x: Tensor) -> Tensor:
        with PlainForms():
            return super().forward(x)


def gates() -> Iterator[Case]:
    for case in ("1x48x64x64", "4x48x64x64"):
        forms = {BASELINE: symmetric_gate.Definition, "operator": symmetric_gate.Operator}
        problems = {name: symmetric_gate.build(form, case, *BFLOAT16) for name, form in forms.items()}
        yield case, torch.bfloat16, problems, PASSES


def subspaces() -> Iterator[Case]:
    for case in (subspace_attention.Case(4, 512, 14), subspace_attention.Case(4, 512, 14, "module")):
        forms = {BASELINE: ByDefinition, "operator": SubspaceAttention}
        problems = {name: subspace_attention.build(form, case, *BFLOAT16) for name, form in forms.items()}
        yield str(case), torch.bfloat16, problems, PASSES


def halos() -> Iterator[Case]:
    for case in (
        halo_attention.Layer(1, 64, 56, heads=4, dim_head=16),
        halo_attention.Layer(1, 128, 32, heads=4, dim_head=32),
        halo_attention.Layer(1, 512, 16, heads=8, dim_head=64),
    ):
        problems = {name: halo_attention.layer(name, case, *BFLOAT16) for name in (BASELINE, "timm", "operator")}
        yield str(case), torch.bfloat16, problems, PASSES


def matches() -> Iterator[Case]:
    for case in match_attention.scales(96, 208, False):
        problems = {name: match_attention.attention(name, case, *BFLOAT16) for name in (BASELINE, "operator")}
        yield str(case), torch.bfloat16, problems, PASSES


def pools() -> Iterator[Case]:
    forms: dict[str, type[nn.Module]] = {
        BASELINE: multi_query_pool.Definition,
        "definition in float32": WidenedDefinition,
        "operator": multi_query_pool.Operator,
    }
    for case in (multi_query_pool.Case(8), multi_query_pool.Case(32), multi_query_pool.Case(32, probes=8, batch=16)):
        for trained in (False, True):
            build = partial(multi_query_pool.averages, trained=trained, case=case, dtype=torch.bfloat16, device="cpu")
            problems = {name: build(form) for name, form in forms.items()}
            yield f"{case}{', tokens too' * trained}", torch.bfloat16, problems, PASSES[trained:]


def accelerated() -> Iterator[Case]:
    """Whole models of timm, which stand as the definition."""
    for name in ("halonet26t", "haloregnetz_b"):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(SEED)
            model = timm.create_model(name).to(dtype)
            images = torch.randn(1, *model.default_cfg["input_size"], dtype=dtype)
            ours = timm.create_model(name).to(dtype)
            ours.load_state_dict(model.state_dict())
            models = {BASELINE: model, "accelerated": accelerate(ours)}
            problems = {form: Problem(module, [images], torch.empty(0)) for form, module in models.items()}
            yield f"{name}, one image", dtype, problems, (INFERENCE,)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "symmetric_gate": gates,
    "subspace_attention": subspaces,
    "halo_attention": halos,
    "match_attention": matches,
    "multi_query_pool": pools,
    "accelerate": accelerated,
}


def milliseconds(problems: dict[str, Problem], mode: str, repeats: int) -> dict[str, list[float]]:
    """Time that the thread works in each form, round after round in turn, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in problems}
    for number in range(repeats + 1):
        for name, problem in problems.items():
            start = time.thread_time()
            run(problem, mode)
            if number:
                times[name].append(1e3 * (time.thread_time() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = environment("cpu")  # before rows change the checkout
    for part in options.parts:
        rows = []
        for case, dtype, problems, modes in PARTS[part]():
            for mode in modes:
                columns = summarize(milliseconds(problems, mode, options.repeats), BASELINE)
                for name in problems:
                    kind = str(dtype).removeprefix("torch.")
                    row = {"part": part, "pass": mode, "case": case, "dtype": kind, "implementation": name}
                    rows.append(row | columns[name] | {"threads": 1, **origin, "seed": SEED})
                    print(*list(rows[-1].values())[:8], sep=" | ", flush=True)
        write_rows(RESULTS / "cpu_bfloat16.csv", rows, key=("part", "device"))


if __name__ == "__main__":
    main()
