"""Launchers of the Triton kernels of `visionattn.kernels.match_attention`, and what they are compiled with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.kernels._triton.match_attention_kernels import (
    match_attention_bwd_kv_kernel,
    match_attention_bwd_q_kernel,
    match_attention_fwd_kernel,
)
from visionattn.kernels.match_attention import _MARGIN, _outputs

__all__ = [
    "Launch",
    "backward",
    "forward",
    "launch",
    "match_attention_bwd_kv_kernel",
    "match_attention_bwd_q_kernel",
    "match_attention_fwd_kernel",
]

# Threads of a program. Of a small map, small programs are enough for more of a chip's processors.
LARGE_BLOCK, SMALL_BLOCK, FEW = 128, 32, 2**17


class Launch(NamedTuple):
    """What the kernels of a call are compiled for, and how many queries or keys a program has: one a thread."""

    constants: dict[str, Any]
    block: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.block // 32, "num_stages": 1, "enable_fp_fusion": True}


def launch(count: int, heads: int, D: int, DV: int, radius: int, similarity: str, dtype: torch.dtype) -> Launch:
    """How a call of so many queries, all heads of all images, is launched."""
    block = LARGE_BLOCK if count > FEW else SMALL_BLOCK
    chunk = min(16 // dtype.itemsize, triton.next_power_of_2(max(D, DV)))
    sizes = {"HEADS": heads, "RADIUS": radius, "D": D, "DV": DV}
    return Launch({**sizes, "CHUNK": chunk, "L1": similarity == "l1", "BLOCK": block}, block)


def _launch(q: Tensor, v: Tensor, radius: int, similarity: str) -> Launch:
    heads, D = q.shape[3:]
    return launch(q.shape[:4].numel(), heads, D, v.shape[4], radius, similarity, q.dtype)


def _sizes(q: Tensor, v: Tensor, radius: int) -> tuple:
    H, W, _, D = q.shape[1:]
    last_y, last_x = (size - 1 - radius - _MARGIN for size in (H, W))
    return q.shape[:4].numel(), H, W, last_y, last_x, D, v.shape[4], D**-0.5


def forward(q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Any strides; the results are contiguous."""
    out, attention = _outputs(q, v, radius)
    inputs = (x.contiguous() for x in (q, k, v, field))
    sizes, launched = _sizes(q, v, radius), _launch(q, v, radius, similarity)
    with torch.cuda.device_of(q):
        match_attention_fwd_kernel[(triton.cdiv(sizes[0], launched.block),)](
            *(*inputs, out, attention, *sizes),
            FIELD_HEADS=field.shape[3],
            **launched.constants,
            **launched.options,
        )
    return out, attention


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
    q, k, v, field = (x.contiguous() for x in (q, k, v, field))
    of_out = q if grad is None else grad.contiguous()
    of_attention = q if grad_attention is None else grad_attention.contiguous()
    sizes, launched = _sizes(q, v, radius), _launch(q, v, radius, similarity)
    count, H, W = sizes[:3]
    attention, slope = (q.new_empty(count, (2 * radius + 2) ** 2, dtype=torch.float32) for _ in range(2))
    first = torch.empty(count, dtype=torch.int64, device=q.device)
    by_q, by_k, by_v = (torch.empty_like(x) for x in (q, k, v))
    by_field = q.new_empty(*q.shape[:4], 2, dtype=torch.float32)
    blocks = triton.cdiv(count, launched.block)
    with torch.cuda.device_of(q):
        match_attention_bwd_q_kernel[(blocks,)](
            *(of_out, of_attention, q, k, v, field, first, attention, slope, by_q, by_field, *sizes),
            OF_OUT=grad is not None,
            OF_ATTENTION=grad_attention is not None,
            FIELD_HEADS=field.shape[3],
            **launched.constants,
            **launched.options,
        )
        rows, order = torch.sort(first, stable=True)
        starts = torch.searchsorted(rows, torch.arange(count + 1, device=q.device))
        chunks = triton.cdiv(max(q.shape[4], v.shape[4]), launched.constants["CHUNK"])
        match_attention_bwd_kv_kernel[(blocks, chunks)](
            *(of_out, q, k, order, starts, attention, slope, by_k, by_v, count, H, W),
            OF_OUT=grad is not None,
            **launched.constants,
            **launched.options,
        )
    if field.shape[3] != q.shape[3]:
        by_field = by_field.sum(3, keepdim=True)
    return by_q, by_k, by_v, by_field.to(field.dtype)
