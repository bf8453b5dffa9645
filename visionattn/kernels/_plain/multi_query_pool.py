"""The plain form of `visionattn.kernels.multi_query_pool` for CPUs.

Images are processed in chunks whose tokens stay in a cache and are read once as keys and as values.

If the processor multiplies bfloat16, its tokens are multiplied unconverted, with float32 sums that are rounded
when they are stored. Two products keep 16 bits of a logit: the second subtracts the rounded first one before it is
rounded itself. In the backward pass, terms that all tokens add to the attention's gradient cancel, so the first token's
term is subtracted before the sum is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn.kernels._plain.processor import multiplies_bfloat16

__all__ = ["backward", "forward"]

# Elements of the tokens of a chunk, for at least one image. On CPUs 1 MiB of float32 is about a core's second-level
# cache; on other devices, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**18, 2**26
_CHUNK_OF_BFLOAT16 = 2**26  # bfloat16 products have a high start-up cost


def _chunks(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Images, and their tokens in the dtype of the computation."""
    B, N, D = x.shape
    wanted = _CHUNK_ON_CPU if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    if dtype == torch.bfloat16:
        wanted = _CHUNK_OF_BFLOAT16
    count = max(1, wanted // max(1, N * D))
    for first in range(0, B, count):
        images = slice(first, first + count)
        tokens = x[images].to(dtype)
        if scales is not None:
            tokens *= scales[images].to(dtype).unsqueeze(2)
        yield images, tokens


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(x: Tensor, q: Tensor, mask: Tensor | None, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """The averages (B, M, D) and the attention (B, M, N)."""
    if multiplies_bfloat16(x):
        return _forward_bfloat16(x, q, mask)
    (B, N, D), M, dtype = x.shape, len(q), _computed_in(q.dtype)
    scaled = q.to(dtype) * D**-0.5
    z, attention = q.new_empty(B, M, D, dtype=dtype), q.new_empty(B, M, N, dtype=dtype)
    for images, tokens in _chunks(x, scales, dtype):
        a = attention[images]
        torch.bmm(scaled.expand(len(tokens), M, D), tokens.transpose(1, 2), out=a)
        if mask is not None:
            absent = ~mask[images, None]
            a.masked_fill_(absent, torch.finfo(dtype).min)
        torch.softmax(a, -1, out=a)
        if mask is not None:
            a.masked_fill_(absent, 0)
        torch.bmm(a, tokens, out=z[images])
    return z.to(q.dtype), attention.to(q.dtype)


def backward(
    grad_z: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    q: Tensor,
    scales: Tensor | None,
    attention: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, empty where it needs none, and of q."""
    if multiplies_bfloat16(x):
        return _backward_bfloat16(grad_z, grad_attention, x, q, attention, needs_x)
    (_, _, D), M, dtype = x.shape, len(q), _computed_in(q.dtype)
    scaled = q.to(dtype) * D**-0.5
    grad_q = q.new_zeros(M, D, dtype=dtype)
    grad_x = x.new_empty(x.shape if needs_x else 0)
    for images, tokens in _chunks(x, scales, dtype):
        g, a = grad_z[images].to(dtype), attention[images].to(dtype)
        slope = torch.bmm(g, tokens.transpose(1, 2))  # of the attention
        if grad_attention is not None:
            slope += grad_attention[images]
        torch.ops.aten._softmax_backward_data.out(slope, a, -1, dtype, grad_input=slope)  # of the logits
        grad_q.addbmm_(slope, tokens)
        if needs_x:
            by_value = torch.bmm(a.transpose(1, 2), g)
            grad_x[images] = by_value.baddbmm_(slope.transpose(1, 2), scaled.expand(len(tokens), M, D))
    return grad_x, grad_q.mul_(D**-0.5).to(q.dtype)


def _forward_bfloat16(x: Tensor, q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, N, D), M, scale = x.shape, len(q), x.shape[2] ** -0.5
    z, attention = q.new_empty(B, M, D), q.new_empty(B, M, N)
    for images, tokens in _chunks(x, None, x.dtype):
        rows = tokens.flatten(0, 1)
        high = torch.addmm(rows.new_zeros(1, M), rows, q.t(), beta=0, alpha=scale)
        low = torch.addmm(high, rows, q.t(), beta=-1, alpha=scale)
        logits = high.float().add_(low).view(len(tokens), N, M).transpose(1, 2).contiguous()
        if mask is not None:
            absent = ~mask[images, None]
            logits.masked_fill_(absent, torch.finfo(torch.float32).min)
        torch.softmax(logits, -1, out=logits)
        if mask is not None:
            logits.masked_fill_(absent, 0)
        torch.bmm(attention[images].copy_(logits), tokens, out=z[images])
    return z, attention


def _backward_bfloat16(
    grad_z: Tensor, grad_attention: Tensor | None, x: Tensor, q: Tensor, attention: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor]:
    (_, N, D), M, scale = x.shape, len(q), x.shape[2] ** -0.5
    grad_q = q.new_zeros(M, D, dtype=torch.float32)
    grad_x = x.new_empty(x.shape if needs_x else 0)
    for images, tokens in _chunks(x, None, x.dtype):
        g, a, size = grad_z[images], attention[images], (len(tokens), M, N)
        of_first = torch.bmm(g, tokens[:, :1].transpose(1, 2)) if N else g.new_zeros(len(tokens), M, 1)
        slope = torch.baddbmm(of_first.expand(size), g, tokens.transpose(1, 2), beta=-1).float()  # of the attention
        if grad_attention is not None:
            slope += grad_attention[images]
        weights = a.float()
        torch.ops.aten._softmax_backward_data.out(slope, weights, -1, torch.float32, grad_input=slope)
        slope = slope.mul_(scale).to(x.dtype)  # of q x
        grad_q += slope.transpose(0, 1).flatten(1) @ tokens.flatten(0, 1)
        if needs_x:
            by_value = torch.bmm(a.transpose(1, 2), g, out=grad_x[images])
            by_value.baddbmm_(slope.transpose(1, 2), q.expand(len(tokens), M, D))
    return grad_x, grad_q.to(q.dtype)
