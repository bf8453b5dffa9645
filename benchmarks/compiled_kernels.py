"""Compile every Triton kernel ahead of time for three generations of chips and write down what each takes.

    python benchmarks/compiled_kernels.py

Needs no GPU: nothing runs. A kernel that spills has stack or local memory; registers decide how many threads fit.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

from aot import compile_for, resources
from report import RESULTS, environment, write_rows
from visionattn.kernels._triton import symmetric_gate

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")


def cases() -> list[tuple]:
    """Kernel, Triton types of its arguments but the pointers, constants."""
    block = {"BLOCK": symmetric_gate.BLOCK}
    return [
        (symmetric_gate.symmetric_gate_fwd_kernel, {"size": "i64:16"}, block),
        (symmetric_gate.symmetric_gate_bwd_kernel, {"size": "i64:16"}, block),
    ]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (kernel, types, constants), dtype, capability in product(cases(), DTYPES, CAPABILITIES):
            pointers = {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
            compiled = compile_for(kernel, pointers | types, constants, capability)
            used = resources(compiled, Path(folder))
            rows.append(
                {
                    "kernel": compiled.metadata.name,
                    "dtype": dtype,
                    "warps": compiled.metadata.num_warps,
                    **used._asdict(),
                    **environment("cpu"),
                    "device": f"sm_{capability}, compiled only",
                }
            )
    write_rows(RESULTS / "compiled_kernels.csv", rows)


if __name__ == "__main__":
    main()
