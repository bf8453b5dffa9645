"""The plain form of `visionattn.kernels.multi_query_pool` for CPUs.

Chunks of images whose tokens stay in a cache are read once as keys and as values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["backward", "forward"]

# Numbers in the tokens of a chunk, of one image at least. On CPUs 1 MiB of float32 is about a core's second-level
# cache; elsewhere, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**18, 2**26


def _chunks(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Images, and their tokens as they are computed with."""
    B, N, D = x.shape
    wanted = _CHUNK_ON_CPU if x.device.type == "cpu" else _CHUNK_ELSEWHERE
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
