"""Compile every Triton kernel ahead of time for three generations of chips and write down what each takes.

    python benchmarks/kernel_resources.py [--operators NAME ...]

Needs no GPU: nothing runs. A kernel that spills has stack or local memory; registers decide how many threads fit;
`tensor_core` counts the matrix instructions in the PTX. Kernels are compiled with the tiles that their launchers take.
Writes results/kernel_resources.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from aot import Case, compile_for, resources, tensor_core_instructions
from report import RESULTS, environment, write_rows
from visionattn.kernels._triton import multi_query_pool, subspace_attention, symmetric_gate

CAPABILITIES = (80, 90, 100)
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = tuple(TORCH)
GATE_FLAGS = ("NORMALISED", "OFFSET", "GAIN", "RECTIFY", "SCALED")


def pointers(kernel, dtype: str, **others: str) -> dict[str, str]:
    """Triton types of a kernel's pointers, by argument name: all of one dtype but those named."""
    return {name: f"*{others.get(name, dtype)}" for name in kernel.arg_names if name.endswith("_ptr")}


def subspace_attention_cases() -> Iterator[Case]:
    kernels = subspace_attention
    single = ("logits", "mean", "factor", "slope", "gate", "by_gate", "by_point", "by_shift", "by_scale")
    scratch = {f"{name}_ptr": "fp32" for name in single} | {"taken_ptr": "i8"}
    for form, dtype in product(("paper", "all"), DTYPES):
        whole = form == "all"
        maps = {"SHIFTED": whole, "RECTIFY": whole}
        cases = {
            kernels.subspace_attention_fwd_logits_kernel: maps,
            kernels.subspace_attention_fwd_gate_kernel: dict.fromkeys(GATE_FLAGS, whole),
            kernels.subspace_attention_bwd_pool_kernel: maps,
        }
        if whole:
            cases |= {kernels.subspace_attention_bwd_gate_kernel: {}, kernels.subspace_attention_bwd_x_kernel: {}}
        for kernel, flags in cases.items():
            sizes = {size: "i32" for size in ("g", "G", "H", "W", "HW") if size in kernel.arg_names}
            types = pointers(kernel, dtype, **scratch) | sizes
            tested = whole and dtype == "bf16"
            yield Case(kernel, dtype, types, kernels.TILE | flags, kernels.OPTIONS, form, tested)


def symmetric_gate_cases() -> Iterator[Case]:
    for kernel in (symmetric_gate.symmetric_gate_fwd_kernel, symmetric_gate.symmetric_gate_bwd_kernel):
        for dtype in DTYPES:
            types = pointers(kernel, dtype) | {"size": "i64:16"}
            yield Case(kernel, dtype, types, {"BLOCK": symmetric_gate.BLOCK}, in_tests=True)


def multi_query_pool_cases() -> Iterator[Case]:
    for dtype, queries in product(DTYPES, (8, 32, 96)):
        tile = multi_query_pool.tiles(queries, TORCH[dtype])
        constants = {**tile.constants, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        numbers = {"M": "i32", "N": "i32", "D": "i32:16", "x_stride_b": "i32:16", "x_stride_n": "i32:16"}
        scratch = {"logits_ptr": "fp32", "slope_ptr": "fp32", "partial_ptr": "fp32", "mask_ptr": "u8"}
        for kernel, others, more in (
            (multi_query_pool.multi_query_pool_fwd_kernel, {"scale": "fp32"}, {"MASKED": False}),
            (multi_query_pool.multi_query_pool_bwd_slope_kernel, {"scale": "fp32"}, {"OF_ATTENTION": False}),
            (multi_query_pool.multi_query_pool_bwd_q_kernel, {"B": "i32", "images": "i32"}, {}),
            (multi_query_pool.multi_query_pool_bwd_x_kernel, {}, {}),
        ):
            names = kernel.arg_names
            types = pointers(kernel, dtype, **scratch) | {k: v for k, v in (numbers | others).items() if k in names}
            tested = dtype == "bf16" and queries == 32
            configuration = f"{tile.queries} queries"
            yield Case(kernel, dtype, types, constants | more, tile.options, configuration, tested, dots=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "multi_query_pool": multi_query_pool_cases,
    "subspace_attention": subspace_attention_cases,
    "symmetric_gate": symmetric_gate_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", default=list(CASES), choices=list(CASES))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for operator in parser.parse_args().operators:
            for case in CASES[operator]():
                for capability in CAPABILITIES:
                    compiled = compile_for(case.kernel, case.types, case.constants, capability, **case.options)
                    rows.append(
                        {
                            "kernel": compiled.metadata.name,
                            "dtype": case.dtype,
                            "configuration": case.configuration,
                            "warps": compiled.metadata.num_warps,
                            **resources(compiled, Path(folder))._asdict(),
                            "tensor_core": tensor_core_instructions(compiled),
                            **environment("cpu"),
                            "device": f"sm_{capability}, compiled only",
                        }
                    )
                    print(*list(rows[-1].values())[:9], f"sm_{capability}", sep=" | ", flush=True)
    write_rows(RESULTS / "kernel_resources.csv", rows, key=("kernel", "dtype", "configuration", "device"))


if __name__ == "__main__":
    main()
