"""An alternative backward pass of match attention for keys and values: every query adds to its window atomically.

The operator sorts queries by the start of their windows and lets keys gather, always in the same order. Here a thread
has a query, as in the operator's other kernels, and adds to the float32 buffers of its keys in the order of execution:
no sort and each tensor read once, but 2 M D atomic additions per query, and results that differ in their last bits.
`benchmarks/kernels/match_attention.py` times both where there is a GPU. Against the operator in Triton's interpreter:

    TRITON_INTERPRET=1 python -m benchmarks.kernels.match_reductions
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._triton import match_attention as launchers
from visionattn.kernels._triton.match_attention_kernels import _chunk_ptrs, _load_chunk, _sign

__all__ = ["MatchAttentionByReductions", "match_attention_bwd_kv_reductions_kernel"]


@triton.jit
def match_attention_bwd_kv_reductions_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    first_ptr,
    attention_ptr,
    ds_ptr,
    dk_ptr,
    dv_ptr,
    count,
    W,
    channels,
    value_channels,
    HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIDE: tl.constexpr = 2 * RADIUS + 2
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    first = tl.load(first_ptr + n, mask=mask, other=0)
    for c in range(0, channels, CHUNK):
        q = _load_chunk(q_ptr, n, mask, c, D, CHUNK)
        k_ptrs, inside = _chunk_ptrs(k_ptr, first, mask, c, D, CHUNK)
        dk_ptrs, _ = _chunk_ptrs(dk_ptr, first, mask, c, D, CHUNK)
        for m in tl.static_range(SIDE * SIDE):
            place = (m // SIDE) * (W * HEADS * D) + (m % SIDE) * (HEADS * D)
            ds = tl.load(ds_ptr + m * count.to(tl.int64) + n, mask=mask, other=0.0)[:, None]
            dk = ds * q
            if L1:
                dk = ds * _sign(q - tl.load(k_ptrs + place, mask=inside, other=0.0).to(tl.float32))
            tl.atomic_add(dk_ptrs + place, dk, mask=inside, sem="relaxed")
    for c in range(0, value_channels, CHUNK):
        grad = _load_chunk(do_ptr, n, mask, c, DV, CHUNK)
        dv_ptrs, inside = _chunk_ptrs(dv_ptr, first, mask, c, DV, CHUNK)
        for m in tl.static_range(SIDE * SIDE):
            place = (m // SIDE) * (W * HEADS * DV) + (m % SIDE) * (HEADS * DV)
            attention = tl.load(attention_ptr + m * count.to(tl.int64) + n, mask=mask, other=0.0)[:, None]
            tl.atomic_add(dv_ptrs + place, attention * grad, mask=inside, sem="relaxed")


class MatchAttentionByReductions(torch.autograd.Function):
    """`torch.ops.visionattn.match_attention` with this backward pass. All tensors are contiguous."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str):
        ctx.save_for_backward(q, k, v, field)
        ctx.settings = radius, similarity
        return launchers.forward(q, k, v, field, radius, similarity)

    @staticmethod
    def backward(ctx, grad: Tensor, grad_attention: Tensor):
        (q, k, v, field), settings = ctx.saved_tensors, ctx.settings
        grad, grad_attention = grad.contiguous(), grad_attention.contiguous()
        found = launchers.backward_q(grad, grad_attention, q, k, v, field, *settings)
        launched = launchers.launch(found.first.numel(), *q.shape[3:], v.shape[4], *settings, q.dtype)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        match_attention_bwd_kv_reductions_kernel[(triton.cdiv(found.first.numel(), launched.block),)](
            *(grad, q, k, found.first, found.attention, found.ds, dk, dv),
            *(found.first.numel(), q.shape[2], q.shape[4], v.shape[4]),
            **launched.constants,
            **launched.options("bwd_kv"),
        )
        dfield = found.dfield if field.shape[3] == q.shape[3] else found.dfield.sum(3, keepdim=True)
        return found.dq, dk.to(k.dtype), dv.to(v.dtype), dfield.to(field.dtype), None, None


def main() -> None:
    torch.manual_seed(0)
    for size, heads, D, Dv, radius, similarity in (((5, 7), 2, 8, 5, 1, "l1"), ((6, 7), 1, 5, 8, 2, "dot")):
        q, k, v = (torch.randn(2, *size, heads, width, requires_grad=True) for width in (D, D, Dv))
        field = (3 * torch.randn(2, *size, heads, 2)).requires_grad_()
        inputs, settings = (q, k, v, field), (radius, similarity)
        expected = torch.ops.visionattn.match_attention(*inputs, *settings)
        cotangents = [torch.randn_like(out) for out in expected]
        found = MatchAttentionByReductions.apply(*inputs, *settings)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        by_found = torch.autograd.grad(found, inputs, cotangents)
        for one, other in zip(by_found, torch.autograd.grad(expected, inputs, cotangents), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        print(f"{size}, radius {radius}, {similarity}: equal")


if __name__ == "__main__":
    main()
