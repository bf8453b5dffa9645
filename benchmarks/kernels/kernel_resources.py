"""Compile every Triton kernel ahead of time for three generations of chips and write down what each takes.

    python -m benchmarks.kernels.kernel_resources [--operators NAME ...]

Needs no GPU: nothing runs. A kernel that spills has stack or local memory; registers decide how many threads fit;
`tensor_core` counts the matrix instructions in the PTX. Kernels are compiled with the tiles that their launchers take.
Writes results/kernel_resources.csv, by version of Triton.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from benchmarks.kernels.aot import Case, compile_for, resources, tensor_core_instructions
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.kernels._triton import (
    halo_attention,
    match_attention,
    multi_query_pool,
    subspace_attention,
    symmetric_gate,
)

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = tuple(TORCH)
HEADS = (8, 16, 32, 64, 128)  # widths of them
GATE_FLAGS = ("NORMALISED", "OFFSET", "GAIN", "RECTIFY", "SCALED")


def pointers(kernel, dtype: str, **others: str) -> dict[str, str]:
    """Triton types of a kernel's pointers, by argument name: all of one dtype but those named."""
    return {name: f"*{others.get(name, dtype)}" for name in kernel.arg_names if name.endswith("_ptr")}


def subspace_attention_cases() -> Iterator[Case]:
    kernels = subspace_attention
    single = ("logits", "mean", "factor", "dlogits", "gate", "dgate", "dpoint", "dshift", "dscale")
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


def halo_attention_cases() -> Iterator[Case]:
    kernels = halo_attention
    shapes = [(block, halo, D) for block, halo in ((8, 3), (8, 4), (10, 3), (12, 2), (14, 2), (7, 2)) for D in HEADS]
    singles = {f"{name}_ptr": "fp32" for name in ("lse", "delta", "dheight", "dwidth")}
    # Chips whose tensor cores read registers, and shared memory.
    for dtype, (block, halo, D), chips in product(DTYPES, shapes, ((80,), (90, 100))):
        # float16 has bfloat16's code.
        if dtype != "bf16" and (block, halo, D) not in ((8, 3, 16), (8, 3, 32), (8, 3, 64)):
            continue
        precision = "tf32x3" if dtype == "fp32" else "tf32"
        given = {"BLOCK": block, "HALO": halo, "STRIDE": 1, "STEP": 1, "HALF": dtype != "fp32", "PRECISION": precision}
        shape = kernels.Shape(D, D, block, halo, 1, TORCH[dtype], from_shared=chips != (80,))
        cases = [
            (
                kernels.halo_attention_fwd_kernel,
                kernels.tiles_of_queries(shape, recompute=recompute),
                {"RECOMPUTE": recompute},
            )
            for recompute in (False, True)
        ]
        if dtype != "fp32" or D <= 16:  # which the launcher takes
            cases += [
                (kernels.halo_attention_bwd_q_kernel, kernels.tiles_of_queries(shape, backward=True), {}),
                (kernels.halo_attention_bwd_kv_kernel, kernels.tiles_of_keys(shape), {}),
            ]
        for kernel, tiles, recompute in cases:
            masked = {"MASK": True} if "MASK" in kernel.arg_names else {}
            constants = given | masked | recompute | tiles.constants
            whole = [name for name in kernel.arg_names if not name.endswith("_ptr") and name not in constants]
            numbers = {name: "i32:16" if name in ("D", "DV") or "_s" in name else "i32" for name in whole}
            types = pointers(kernel, dtype, **singles) | numbers | {"scale": "fp32"}
            configuration = f"block {block}, halo {halo}, D {D}" + ", again" * recompute.get("RECOMPUTE", False)
            tested = dtype == "bf16" and (block, halo, D) in ((8, 3, 16), (8, 3, 64))
            yield Case(kernel, dtype, types, constants, tiles.options, configuration, tested, dots=True, chips=chips)


def match_attention_cases() -> Iterator[Case]:
    kernels = match_attention
    singles = {f"{name}_ptr": "fp32" for name in ("field", "attention", "ds", "dfield")}
    numbers = {"count": "i32:16", "H": "i32:16", "W": "i32:16"}
    numbers |= dict.fromkeys(("channels", "value_channels"), "i32")
    numbers |= dict.fromkeys(("last_y", "last_x", "scale"), "fp32")
    # Unrolled over the keys of a window: minutes to compile where there are many.
    shapes = {
        "fp32": [(1, 8), (1, 40), (2, 32), (3, 16)],
        "bf16": [(1, 8), (1, 16), (1, 40), (1, 128), (2, 32), (2, 40), (2, 80), (3, 16)],
        "fp16": [(1, 8), (2, 40)],
    }
    shaped = [(dtype, *shape) for dtype, found in shapes.items() for shape in found]
    # Large maps have large programs, small ones small.
    for (dtype, radius, D), count in product(shaped, (2 * kernels.FEW, kernels.FEW)):
        launched = kernels.launch(count, 4, D, D, radius, "l1", TORCH[dtype])
        flags = {"HAS_DO": True, "HAS_DP": True, "FIELD_HEADS": 4}
        backward = (kernels.match_attention_bwd_q_kernel, kernels.match_attention_bwd_kv_kernel)
        for kernel in (kernels.match_attention_fwd_kernel, *(backward if radius < 3 else ())):
            own = {name: value for name, value in (launched.constants | flags).items() if name in kernel.arg_names}
            rows = dict.fromkeys(("first_ptr", "order_ptr", "starts_ptr"), "i64")
            handed_out = {"attention_ptr": dtype} if kernel is kernels.match_attention_fwd_kernel else {}
            types = pointers(kernel, dtype, **singles | rows | handed_out)
            types |= {name: kind for name, kind in numbers.items() if name in kernel.arg_names}
            tested = dtype == "bf16" and (radius, D, launched.block) == (1, 8, kernels.LARGE_BLOCK)
            part = kernel.__name__.removeprefix("match_attention_").removesuffix("_kernel")
            configuration = f"radius {radius}, D {D}, {launched.block} threads"
            yield Case(kernel, dtype, types, own, launched.options(part), configuration, tested)


def multi_query_pool_cases() -> Iterator[Case]:
    kernels = multi_query_pool
    # Numbers of queries that share tiles share kernels.
    tiled = {(dtype, kernels.tiles(queries, TORCH[dtype]).queries): None for dtype in DTYPES for queries in (8, 32, 96)}
    for (dtype, queries), int8 in product(tiled, (False, True)):
        forward = kernels.tiles(queries, TORCH[dtype])
        backward = kernels.tiles(queries, TORCH[dtype], int8_backward=int8)
        of_tokens = kernels.tiles_of_tokens(queries, TORCH[dtype])
        precision = {"PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        numbers = {"M": "i32", "N": "i32", "D": "i32:16", "x_stride_b": "i32:16", "x_stride_n": "i32:16"}
        scratch = {"logits_ptr": "fp32", "ds_ptr": "fp32", "dq_partial_ptr": "fp32", "mask_ptr": "u8"}
        if int8:
            scratch |= {"x_ptr": "i8", "scales_ptr": "fp16"}
        for kernel, tile, others, more in (
            (kernels.multi_query_pool_fwd_kernel, forward, {"scale": "fp32"}, {"MASKED": False, "SCALED": int8}),
            (
                kernels.multi_query_pool_bwd_slope_kernel,
                backward,
                {"scale": "fp32"},
                {"HAS_DP": False, "SCALED": int8},
            ),
            (kernels.multi_query_pool_bwd_q_kernel, backward, {"B": "i32", "images": "i32"}, {}),
            *([] if int8 else [(kernels.multi_query_pool_bwd_x_kernel, of_tokens, {}, {})]),
        ):
            names = kernel.arg_names
            types = pointers(kernel, dtype, **scratch) | {k: v for k, v in (numbers | others).items() if k in names}
            tested = dtype == "bf16" and queries == 32
            constants = tile.constants | precision | more
            configuration = f"{queries} queries" + ", int8 tokens" * int8
            yield Case(kernel, dtype, types, constants, tile.options, configuration, tested, dots=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "halo_attention": halo_attention_cases,
    "match_attention": match_attention_cases,
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
                for capability in case.chips:
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
    write_rows(RESULTS / "kernel_resources.csv", rows, key=("kernel", "dtype", "configuration", "device", "triton"))


if __name__ == "__main__":
    main()
