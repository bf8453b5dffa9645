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
from pathlib import Path

from aot import Case, compile_for, resources, tensor_core_instructions
from report import RESULTS, environment, write_rows
from visionattn.kernels._triton import symmetric_gate

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")


def pointers(kernel, dtype: str, **others: str) -> dict[str, str]:
    """Triton types of a kernel's pointers, by argument name: all of one dtype but those named."""
    return {name: f"*{others.get(name, dtype)}" for name in kernel.arg_names if name.endswith("_ptr")}


def symmetric_gate_cases() -> Iterator[Case]:
    for kernel in (symmetric_gate.symmetric_gate_fwd_kernel, symmetric_gate.symmetric_gate_bwd_kernel):
        for dtype in DTYPES:
            types = pointers(kernel, dtype) | {"size": "i64:16"}
            yield Case(kernel, dtype, types, {"BLOCK": symmetric_gate.BLOCK}, in_tests=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
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
