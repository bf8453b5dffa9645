"""Triton kernels of `visionattn.kernels.multi_query_pool`.

A program has one image and a tile of queries. It goes over the tokens twice, as keys and as values, close enough in
time for the second pass to find them in the second-level cache; what it needs between the passes goes through memory,
so that neither the number of tokens nor their width is bounded by registers. The gradient of the queries is a sum over
images: programs sum groups of them, and PyTorch sums the groups, always in the same order. Nothing is added atomically.

Products are the tensor cores'. Those with the logits' gradient take it in TF32, for half precisions too: in float16
small gradients would vanish. Float32 is multiplied in TF32 where `torch.backends.cuda.matmul.allow_tf32` says so, else
in three TF32 products, which lose little more than float32 itself. Tokens of int8 become the other factor's dtype in
registers, which all of these hold exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._triton import ALL_REGISTERS

__all__ = [
    "backward",
    "forward",
    "multi_query_pool_bwd_q_kernel",
    "multi_query_pool_bwd_slope_kernel",
    "multi_query_pool_bwd_x_kernel",
    "multi_query_pool_fwd_kernel",
    "tiles",
    "tiles_of_tokens",
]

LOG2_E = math.log2(math.e)
PROGRAMS = 512  # that share the sum over images: some for each multiprocessor


@triton.jit
def _rows(ptr, rows, n_rows, stride, columns, n_columns):
    """A tile of a matrix whose rows are `stride` apart, zeros outside."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _scales(ptr, image, n, N):
    """A scale a token of int8, as a row in float32, zeros outside."""
    return tl.load(ptr + image * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _by_tokens(left_ptr, x_ptr, m, n, M, N, D, x_stride_n, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Products of a tile of rows (M, D) and a tile of tokens: (BLOCK_M, BLOCK_N) in float32."""
    product = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        left = _rows(left_ptr, m, M, D, d, D)
        x = _rows(x_ptr, n, N, x_stride_n, d, D).to(left.dtype)
        product = tl.dot(left, tl.trans(x), product, input_precision=PRECISION)
    return product


@triton.jit
def multi_query_pool_fwd_kernel(
    x_ptr,
    q_ptr,
    mask_ptr,
    scales_ptr,
    z_ptr,
    attention_ptr,
    logits_ptr,
    M,
    N,
    D,
    x_stride_b,
    x_stride_n,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += image * x_stride_b
    z_ptr += image * M * D
    attention_ptr += image * M * N
    logits_ptr += image * M * N

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        present = n < N
        if MASKED:
            present = tl.load(mask_ptr + image * N + n, mask=present, other=0) != 0
        logits = scale * _by_tokens(q_ptr, x_ptr, m, n, M, N, D, x_stride_n, BLOCK_D, PRECISION)
        if SCALED:
            logits *= _scales(scales_ptr, image, n, N)
        logits = tl.where(present[None, :], logits, float("-inf"))
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(logits_ptr + m[:, None] * N + n[None, :], logits, mask=inside)
        before, largest = largest, tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)  # no token so far: -inf less -inf is NaN
        total = total * tl.exp2(before - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.where(total > 0, 1 / total, 0.0)

    # What one thread has written another reads.
    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        place = m[:, None] * N + n[None, :]
        logits = tl.load(logits_ptr + place, mask=inside, other=float("-inf"))
        tl.store(attention_ptr + place, tl.exp2(logits - finite[:, None]) * share[:, None], mask=inside)

    tl.debug_barrier()
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        z = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            attention = _rows(attention_ptr, m, M, N, n, N)
            x = _rows(x_ptr, n, N, x_stride_n, d, D)
            if SCALED:
                # In TF32 for half precisions too: a small share of a small scale would vanish in float16.
                attention = attention.to(tl.float32) * _scales(scales_ptr, image, n, N)
                x = x.to(tl.float32)
            z = tl.dot(attention, x, z, input_precision=PRECISION)
        tl.store(z_ptr + m[:, None] * D + d[None, :], z, mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def multi_query_pool_bwd_slope_kernel(
    grad_z_ptr,
    grad_attention_ptr,
    x_ptr,
    scales_ptr,
    attention_ptr,
    slope_ptr,
    M,
    N,
    D,
    x_stride_b,
    x_stride_n,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OF_ATTENTION: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient d of the products q . x, times the scales where tokens have some: (B, M, N) in float32."""
    image = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += image * x_stride_b
    grad_z_ptr += image * M * D
    grad_attention_ptr += image * M * N
    attention_ptr += image * M * N
    slope_ptr += image * M * N

    mean = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        e = _by_tokens(grad_z_ptr, x_ptr, m, n, M, N, D, x_stride_n, BLOCK_D, PRECISION)
        if SCALED:
            e *= _scales(scales_ptr, image, n, N)
        if OF_ATTENTION:
            e += _rows(grad_attention_ptr, m, M, N, n, N)
        attention = _rows(attention_ptr, m, M, N, n, N).to(tl.float32)
        mean += tl.sum(attention * e, 1)
        tl.store(slope_ptr + m[:, None] * N + n[None, :], e, mask=(m < M)[:, None] & (n < N)[None, :])

    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        e = _rows(slope_ptr, m, M, N, n, N)
        attention = _rows(attention_ptr, m, M, N, n, N).to(tl.float32)
        slope = scale * attention * (e - mean[:, None])
        if SCALED:
            slope *= _scales(scales_ptr, image, n, N)
        tl.store(slope_ptr + m[:, None] * N + n[None, :], slope, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def multi_query_pool_bwd_q_kernel(
    slope_ptr,
    x_ptr,
    partial_ptr,
    B,
    M,
    N,
    D,
    x_stride_b,
    x_stride_n,
    images,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of d x, d with its scales, over groups of `images` images: (groups, M, D) in float32."""
    group = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for image in range(group * images, tl.minimum(B, (group + 1) * images)):
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            slope = _rows(slope_ptr + image * M * N, m, M, N, n, N)
            x = _rows(x_ptr + image * x_stride_b, n, N, x_stride_n, d, D).to(tl.float32)
            total = tl.dot(slope, x, total, input_precision=PRECISION)
    inside = (m < M)[:, None] & (d < D)[None, :]
    tl.store(partial_ptr + group * M * D + m[:, None] * D + d[None, :], total, mask=inside)


@triton.jit
def multi_query_pool_bwd_x_kernel(
    grad_z_ptr,
    q_ptr,
    attention_ptr,
    slope_ptr,
    grad_x_ptr,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        attention = _rows(attention_ptr + image * M * N, m, M, N, n, N)
        grad_z = _rows(grad_z_ptr + image * M * D, m, M, D, d, D)
        grad_x = tl.dot(tl.trans(attention), grad_z, grad_x, input_precision=PRECISION)
        slope = _rows(slope_ptr + image * M * N, m, M, N, n, N)
        q = _rows(q_ptr, m, M, D, d, D).to(tl.float32)
        grad_x = tl.dot(tl.trans(slope), q, grad_x, input_precision=PRECISION)
    inside = (n < N)[:, None] & (d < D)[None, :]
    tl.store(grad_x_ptr + image * N * D + n[:, None] * D + d[None, :], grad_x, mask=inside)


class Tiles(NamedTuple):
    """Sizes of tiles, and what else a program is compiled with."""

    queries: int
    tokens: int
    channels: int
    warps: int
    all_registers: bool

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.queries, "BLOCK_N": self.tokens, "BLOCK_D": self.channels}

    @property
    def options(self) -> dict[str, int]:
        limit = ALL_REGISTERS if self.all_registers else {}
        return {"num_warps": self.warps, "num_stages": 3 if self.warps == 4 else 2, **limit}


def tiles(M: int, dtype: torch.dtype, int8_backward: bool = False) -> Tiles:
    """Choose tiles for a number of queries: 16 at least, for tensor cores, and no more than registers hold."""
    queries = min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(M)))
    return Tiles(queries, 64, 64, warps=4 if queries == 16 else 8, all_registers=int8_backward)


def tiles_of_tokens(M: int, dtype: torch.dtype) -> Tiles:
    """Choose those of the kernel whose programs have tokens: in float32 fewer of them, for the registers' sake."""
    tile = tiles(M, dtype)
    return tile._replace(tokens=32) if dtype == torch.float32 else tile


def precision(dtype: torch.dtype) -> str:
    """How products of tensors of a dtype are computed; that of half precisions is given by the dtype."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def forward(x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Any strides; the results are contiguous."""
    (B, N, D), M = x.shape, len(q)
    x, q = _with_dense_rows(x), q.contiguous()
    z, attention = q.new_empty(B, M, D), q.new_empty(B, M, N)
    logits = q.new_empty(B, M, N, dtype=torch.float32)
    marks = x if mask is None else mask.contiguous().view(torch.uint8)
    sizes = (M, N, D, x.stride(0), x.stride(1))
    tile = tiles(M, q.dtype)
    with torch.cuda.device_of(x):
        multi_query_pool_fwd_kernel[(B, triton.cdiv(M, tile.queries))](
            *(x, q, marks, _dense(scales, q), z, attention, logits),
            *sizes,
            D**-0.5 * LOG2_E,
            **tile.constants,
            MASKED=mask is not None,
            SCALED=scales is not None,
            PRECISION=precision(q.dtype),
            **tile.options,
            enable_fp_fusion=True,
        )
    return z, attention


def backward(
    grad_z: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    q: Tensor,
    scales: Tensor | None,
    attention: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels. Any strides; the results are contiguous."""
    (B, N, D), M = x.shape, len(q)
    x, q, grad_z, attention = _with_dense_rows(x), q.contiguous(), grad_z.contiguous(), attention.contiguous()
    tile, of_tokens = tiles(M, q.dtype, int8_backward=scales is not None), tiles_of_tokens(M, q.dtype)
    constants = {**tile.constants, "PRECISION": precision(q.dtype)}
    options = {**tile.options, "enable_fp_fusion": True}
    of_queries, of_channels = triton.cdiv(M, tile.queries), triton.cdiv(D, tile.channels)
    slope = q.new_empty(B, M, N, dtype=torch.float32)
    images = triton.cdiv(B * of_queries * of_channels, PROGRAMS)
    partial = q.new_empty(triton.cdiv(B, images), M, D, dtype=torch.float32)
    grad_x = x.new_empty((B, N, D) if needs_x else 0)
    with torch.cuda.device_of(x):
        multi_query_pool_bwd_slope_kernel[(B, of_queries)](
            grad_z,
            _dense(grad_attention, attention),
            *(x, _dense(scales, q), attention, slope),
            *(M, N, D, x.stride(0), x.stride(1), D**-0.5),
            OF_ATTENTION=grad_attention is not None,
            SCALED=scales is not None,
            **constants,
            **options,
        )
        multi_query_pool_bwd_q_kernel[(len(partial), of_queries, of_channels)](
            *(slope, x, partial, B, M, N, D, x.stride(0), x.stride(1), images), **constants, **options
        )
        if needs_x:
            multi_query_pool_bwd_x_kernel[(B, triton.cdiv(N, of_tokens.tokens), of_channels)](
                *(grad_z, q, attention, slope, grad_x, M, N, D),
                **{**constants, **of_tokens.constants},
                **{**options, **of_tokens.options},
            )
    return grad_x, partial.sum(0).to(q.dtype)


def _dense(optional: Tensor | None, instead: Tensor) -> Tensor:
    """Give an argument as a kernel reads it; where there is none, another in its place, which it does not read."""
    return instead if optional is None else optional.contiguous()


def _with_dense_rows(x: Tensor) -> Tensor:
    """Give tokens whose channels lie side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
