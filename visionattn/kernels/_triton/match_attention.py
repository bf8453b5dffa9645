"""Launchers of the Triton kernels of `visionattn.kernels.match_attention`, and their compile-time parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.kernels._plain.match_attention import MARGIN, empty_outputs
from visionattn.kernels._triton.match_attention_kernels import (
    match_attention_bwd_kv_kernel,
    match_attention_bwd_q_kernel,
    match_attention_fwd_kernel,
)

__all__ = [
    "Launch",
    "backward",
    "backward_q",
    "forward",
    "launch",
    "match_attention_bwd_kv_kernel",
    "match_attention_bwd_q_kernel",
    "match_attention_fwd_kernel",
]

# Threads of a program. For a small map, small programs occupy more of a chip's multiprocessors.
LARGE_BLOCK, SMALL_BLOCK, FEW = 128, 32, 2**17


class Launch(NamedTuple):
    """What the kernels of a call are compiled for.

    Attributes:
        constants: Compile-time arguments.
        block: Number of queries or keys of a program, one per thread.
        registers: Maximum registers per thread, for kernels (`"fwd"`, `"bwd_q"`) with a limit.
    """

    constants: dict[str, Any]
    block: int
    registers: dict[str, int]

    def options(self, kernel: str) -> dict[str, Any]:
        limit = {"maxnreg": self.registers[kernel]} if kernel in self.registers else {}
        return {"num_warps": self.block // 32, "num_stages": 1, "enable_fp_fusion": True, **limit}


def launch(count: int, heads: int, D: int, DV: int, radius: int, similarity: str, dtype: torch.dtype) -> Launch:
    """Launch parameters of a call with this number of queries, over all heads of all images."""
    block = LARGE_BLOCK if count > FEW else SMALL_BLOCK
    chunk = min(16 // dtype.itemsize, triton.next_power_of_2(max(D, DV)))
    constants = {"HEADS": heads, "RADIUS": radius, "D": D, "DV": DV, "CHUNK": chunk, "L1": similarity == "l1"}
    # Without a limit, ptxas spills some bytes, to fit one more program or where it uses all registers.
    registers = {}
    if radius == 1 and block == SMALL_BLOCK:
        registers = {"fwd": 96}
    elif radius == 2:
        registers = {"fwd": 208 if dtype == torch.float32 else 168, "bwd_q": 240}
    return Launch({**constants, "BLOCK": block}, block, registers)


def _launch(q: Tensor, v: Tensor, radius: int, similarity: str) -> Launch:
    heads, D = q.shape[3:]
    return launch(q.shape[:4].numel(), heads, D, v.shape[4], radius, similarity, q.dtype)


def _sizes(q: Tensor, v: Tensor, radius: int) -> dict[str, Any]:
    """Arguments of the kernels over queries, by name."""
    H, W, _, D = q.shape[1:]
    return {
        "count": q.shape[:4].numel(),
        "H": H,
        "W": W,
        "last_y": H - 1 - radius - MARGIN,
        "last_x": W - 1 - radius - MARGIN,
        "channels": D,
        "value_channels": v.shape[4],
        "scale": D**-0.5,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Any strides; the results are contiguous."""
    out, attention = empty_outputs(q, v, radius)
    sizes, launched = _sizes(q, v, radius), _launch(q, v, radius, similarity)
    with torch.cuda.device_of(q):
        match_attention_fwd_kernel[(triton.cdiv(sizes["count"], launched.block),)](
            q_ptr=q.contiguous(),
            k_ptr=k.contiguous(),
            v_ptr=v.contiguous(),
            field_ptr=field.contiguous(),
            out_ptr=out,
            attention_ptr=attention,
            **sizes,
            FIELD_HEADS=field.shape[3],
            **launched.constants,
            **launched.options("fwd"),
        )
    return out, attention


class OfQueries(NamedTuple):
    """Results of the first backward kernel: the gradients of the queries, and the input of the second one.

    Attributes:
        dq: (B, H, W, heads, D).
        dfield: (B, H, W, heads, 2), in float32.
        first: The row of each query's first key, (B H W heads).
        attention: (M, B H W heads), in float32.
        ds: Gradient of the scores, over sqrt(D), (M, B H W heads), in float32.
    """

    dq: Tensor
    dfield: Tensor
    first: Tensor
    attention: Tensor
    ds: Tensor


def backward_q(
    grad: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: Tensor,
    radius: int,
    similarity: str,
) -> OfQueries:
    """Launch the backward kernel over queries. All tensors are contiguous."""
    sizes, launched = _sizes(q, v, radius), _launch(q, v, radius, similarity)
    count, window = sizes["count"], (2 * radius + 2) ** 2
    found = OfQueries(
        torch.empty_like(q),
        q.new_empty(*q.shape[:4], 2, dtype=torch.float32),
        torch.empty(count, dtype=torch.int64, device=q.device),
        *(q.new_empty(window, count, dtype=torch.float32) for _ in range(2)),
    )
    with torch.cuda.device_of(q):
        match_attention_bwd_q_kernel[(triton.cdiv(count, launched.block),)](
            do_ptr=_or(grad, q),
            dp_ptr=_or(grad_attention, q),
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            field_ptr=field,
            first_ptr=found.first,
            attention_ptr=found.attention,
            ds_ptr=found.ds,
            dq_ptr=found.dq,
            dfield_ptr=found.dfield,
            **sizes,
            HAS_DO=grad is not None,
            HAS_DP=grad_attention is not None,
            FIELD_HEADS=field.shape[3],
            **launched.constants,
            **launched.options("bwd_q"),
        )
    return found


def _backward_kv(
    grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, found: OfQueries, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """Sort queries by the start of their windows, and launch the backward kernel over keys."""
    launched = _launch(q, v, radius, similarity)
    count = q.shape[:4].numel()
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    chunks = triton.cdiv(max(q.shape[4], v.shape[4]), launched.constants["CHUNK"])
    with torch.cuda.device_of(q):
        rows, order = torch.sort(found.first, stable=True)
        starts = torch.searchsorted(rows, torch.arange(count + 1, device=q.device))
        match_attention_bwd_kv_kernel[(triton.cdiv(count, launched.block), chunks)](
            do_ptr=_or(grad, q),
            q_ptr=q,
            k_ptr=k,
            order_ptr=order,
            starts_ptr=starts,
            attention_ptr=found.attention,
            ds_ptr=found.ds,
            dk_ptr=dk,
            dv_ptr=dv,
            count=count,
            H=q.shape[1],
            W=q.shape[2],
            HAS_DO=grad is not None,
            **launched.constants,
            **launched.options("bwd_kv"),
        )
    return dk, dv


def _or(optional: Tensor | None, instead: Tensor) -> Tensor:
    """The argument, or another tensor if it is None: the kernel does not read that one."""
    return instead if optional is None else optional


def backward(
    grad: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: Tensor,
    radius: int,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels. Any strides; the results are contiguous."""
    grad, grad_attention = (None if x is None else x.contiguous() for x in (grad, grad_attention))
    q, k, v, field = (x.contiguous() for x in (q, k, v, field))
    found = backward_q(grad, grad_attention, q, k, v, field, radius, similarity)
    dk, dv = _backward_kv(grad, q, k, v, found, radius, similarity)
    dfield = found.dfield
    if field.shape[3] != q.shape[3]:
        dfield = dfield.sum(3, keepdim=True)
    return found.dq, dk, dv, dfield.to(field.dtype)
