"""Ahead-of-time compilation of Triton kernels for real chips, on a machine without one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

CAPABILITIES = (80, 90, 100)


class Case(NamedTuple):
    """A kernel as its launcher compiles it for one kind of input.

    Attributes:
        kernel: The jit function.
        dtype: Of the operator's tensors: `"fp32"`, `"bf16"` or `"fp16"`.
        types: Argument name -> Triton type, as `compile_for` takes them.
        constants: Argument name -> value.
        options: `num_warps`, `num_stages`, `maxnreg`.
        configuration: What distinguishes it from the kernel's other cases, for the table.
        in_tests: Whether `make test` compiles it, and it must not spill.
        dots: Whether it is meant to have tensor-core instructions.
        chips: Capabilities that it is compiled for.
    """

    kernel: Any
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: Mapping[str, int] = MappingProxyType({})
    configuration: str = ""
    in_tests: bool = False
    dots: bool = False
    chips: tuple[int, ...] = CAPABILITIES


class Resources(NamedTuple):
    """Resources of a kernel: registers per thread, and bytes of stack, shared and local memory."""

    registers: int
    stack: int
    shared: int
    local: int


def compile_for(kernel, types: dict[str, str], constants: dict, capability: int = 90, **options) -> CompiledKernel:
    """Compile a `triton.jit` kernel for an NVIDIA chip.

    Args:
        kernel: The jit function. Arguments that `constants` names are compile-time constants.
        types: Argument name -> Triton type: `"*bf16"`, `"i64"`, or `"i64:16"` for a number divisible by 16, which
            Triton tells apart at launch. Pointers count as 16-byte aligned, as the memory that PyTorch allocates is.
        constants: Argument name -> value.
        capability: 80 (A100), 90 (H100) or 100 (B200).
        **options: `num_warps`, `num_stages`, `maxnreg`. Multiply and add are fused, as our launchers ask.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True} | options
    )


def resources(compiled: CompiledKernel, folder: Path) -> Resources:
    """Read a compiled kernel's resource usage with the cuobjdump of the Triton wheel.

    Raises:
        FileNotFoundError: The wheel has none.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / f"{compiled.metadata.name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    # Shared memory is requested at launch, so that the file does not state its size.
    return Resources(int(usage["REG"]), int(usage["STACK"]), compiled.metadata.shared, int(usage["LOCAL"]))


def tensor_core_instructions(compiled: CompiledKernel) -> int:
    """Count the matrix instructions of a compiled kernel's PTX: `mma.sync`, `wgmma` and `tcgen05.mma`."""
    return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
