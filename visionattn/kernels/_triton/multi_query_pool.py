"""Triton kernels of `visionattn.kernels.multi_query_pool`.

A program has one image and a tile of queries. It loops over the tokens twice, as keys and as values, close enough in
time for the second pass to hit the second-level cache; intermediate results go through memory,
so that neither the number of tokens nor their width is bounded by registers. The gradient of the queries is a sum over
images: programs sum groups of them, and PyTorch sums the groups, always in the same order, without atomic additions.

Products run on tensor cores. Those with the logits' gradient use TF32, also for half precision: in float16
small gradients would vanish. Float32 is multiplied in TF32 if `torch.backends.cuda.matmul.allow_tf32` is set, otherwise
in three TF32 products, which are almost as accurate as float32. Int8 tokens are converted in registers to the other
factor's dtype, which represents them exactly.
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
PROGRAMS = 512  # for the sum over images: some for each multiprocessor


@triton.jit
def _load_rows(ptr, rows, n_rows, stride, columns, n_columns):
    """A tile of a matrix whose rows are `stride` apart, zeros outside."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _load_scales(ptr, image, offs_n, N):
    """Scales of int8 tokens, one per token, as a row in float32, zeros outside."""
    return tl.load(ptr + image * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _dot_tokens(left_ptr, x_ptr, offs_m, offs_n, M, N, D, x_stride_n, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Products of a tile of rows (M, D) and a tile of tokens: (BLOCK_M, BLOCK_N) in float32."""
    product = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        left = _load_rows(left_ptr, offs_m, M, D, offs_d, D)
        x = _load_rows(x_ptr, offs_n, N, x_stride_n, offs_d, D).to(left.dtype)
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
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += image * x_stride_b
    z_ptr += image * M * D
    attention_ptr += image * M * N
    logits_ptr += image * M * N

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        present = offs_n < N
        if MASKED:
            present = tl.load(mask_ptr + image * N + offs_n, mask=present, other=0) != 0
        logits = scale * _dot_tokens(q_ptr, x_ptr, offs_m, offs_n, M, N, D, x_stride_n, BLOCK_D, PRECISION)
        if SCALED:
            logits *= _load_scales(scales_ptr, image, offs_n, N)
        logits = tl.where(present[None, :], logits, float("-inf"))
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(logits_ptr + offs_m[:, None] * N + offs_n[None, :], logits, mask=inside)
        m_prev, m_i = m_i, tl.maximum(m_i, tl.max(logits, 1))
        finite = tl.where(m_i == float("-inf"), 0.0, m_i)  # no token so far: -inf less -inf is NaN
        l_i = l_i * tl.exp2(m_prev - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
    finite = tl.where(m_i == float("-inf"), 0.0, m_i)
    inverse_sum = tl.where(l_i > 0, 1 / l_i, 0.0)

    # Threads read what other threads have written.
    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        offsets = offs_m[:, None] * N + offs_n[None, :]
        logits = tl.load(logits_ptr + offsets, mask=inside, other=float("-inf"))
        tl.store(attention_ptr + offsets, tl.exp2(logits - finite[:, None]) * inverse_sum[:, None], mask=inside)

    tl.debug_barrier()
    for column in range(0, D, BLOCK_D):
        offs_d = column + tl.arange(0, BLOCK_D)
        z = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            attention = _load_rows(attention_ptr, offs_m, M, N, offs_n, N)
            x = _load_rows(x_ptr, offs_n, N, x_stride_n, offs_d, D)
            if SCALED:
                # In TF32 for half precision too: a small weight times a small scale would vanish in float16.
                attention = attention.to(tl.float32) * _load_scales(scales_ptr, image, offs_n, N)
                x = x.to(tl.float32)
            z = tl.dot(attention, x, z, input_precision=PRECISION)
        tl.store(z_ptr + offs_m[:, None] * D + offs_d[None, :], z, mask=(offs_m < M)[:, None] & (offs_d < D)[None, :])


@triton.jit
def multi_query_pool_bwd_slope_kernel(
    dz_ptr,
    dp_ptr,
    x_ptr,
    scales_ptr,
    attention_ptr,
    ds_ptr,
    M,
    N,
    D,
    x_stride_b,
    x_stride_n,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient ds of the products q . x, times the scales of the tokens where given: (B, M, N) in float32."""
    image = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += image * x_stride_b
    dz_ptr += image * M * D
    dp_ptr += image * M * N
    attention_ptr += image * M * N
    ds_ptr += image * M * N

    delta = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        dp = _dot_tokens(dz_ptr, x_ptr, offs_m, offs_n, M, N, D, x_stride_n, BLOCK_D, PRECISION)
        if SCALED:
            dp *= _load_scales(scales_ptr, image, offs_n, N)
        if HAS_DP:
            dp += _load_rows(dp_ptr, offs_m, M, N, offs_n, N)
        attention = _load_rows(attention_ptr, offs_m, M, N, offs_n, N).to(tl.float32)
        delta += tl.sum(attention * dp, 1)
        tl.store(ds_ptr + offs_m[:, None] * N + offs_n[None, :], dp, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])

    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        dp = _load_rows(ds_ptr, offs_m, M, N, offs_n, N)
        attention = _load_rows(attention_ptr, offs_m, M, N, offs_n, N).to(tl.float32)
        ds = scale * attention * (dp - delta[:, None])
        if SCALED:
            ds *= _load_scales(scales_ptr, image, offs_n, N)
        tl.store(ds_ptr + offs_m[:, None] * N + offs_n[None, :], ds, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def multi_query_pool_bwd_q_kernel(
    ds_ptr,
    x_ptr,
    dq_partial_ptr,
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
    """Partial sums of dq over groups of `images` images: (groups, M, D) in float32."""
    group = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for image in range(group * images, tl.minimum(B, (group + 1) * images)):
        for first in range(0, N, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            ds = _load_rows(ds_ptr + image * M * N, offs_m, M, N, offs_n, N)
            x = _load_rows(x_ptr + image * x_stride_b, offs_n, N, x_stride_n, offs_d, D).to(tl.float32)
            dq = tl.dot(ds, x, dq, input_precision=PRECISION)
    inside = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    tl.store(dq_partial_ptr + group * M * D + offs_m[:, None] * D + offs_d[None, :], dq, mask=inside)


@triton.jit
def multi_query_pool_bwd_x_kernel(
    dz_ptr,
    q_ptr,
    attention_ptr,
    ds_ptr,
    dx_ptr,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, M, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        attention = _load_rows(attention_ptr + image * M * N, offs_m, M, N, offs_n, N)
        dz = _load_rows(dz_ptr + image * M * D, offs_m, M, D, offs_d, D)
        dx = tl.dot(tl.trans(attention), dz, dx, input_precision=PRECISION)
        ds = _load_rows(ds_ptr + image * M * N, offs_m, M, N, offs_n, N)
        q = _load_rows(q_ptr, offs_m, M, D, offs_d, D).to(tl.float32)
        dx = tl.dot(tl.trans(ds), q, dx, input_precision=PRECISION)
    inside = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    tl.store(dx_ptr + image * N * D + offs_n[:, None] * D + offs_d[None, :], dx, mask=inside)


class Tiles(NamedTuple):
    """Sizes of tiles, and other compile-time parameters."""

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
    """Choose tiles for a number of queries: at least 16, for tensor cores, and no more than registers hold."""
    queries = min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(M)))
    return Tiles(queries, 64, 64, warps=4 if queries == 16 else 8, all_registers=int8_backward)


def tiles_of_tokens(M: int, dtype: torch.dtype) -> Tiles:
    """Choose tiles of the kernel whose programs have tokens: fewer of them in float32, to save registers."""
    tile = tiles(M, dtype)
    return tile._replace(tokens=32) if dtype == torch.float32 else tile


def precision(dtype: torch.dtype) -> str:
    """Input precision of products of a dtype; half precision is determined by the dtype."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def forward(x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Any strides; the results are contiguous."""
    (B, N, D), M = x.shape, len(q)
    x, q = _with_dense_rows(x), q.contiguous()
    z, attention = q.new_empty(B, M, D), q.new_empty(B, M, N)
    logits = q.new_empty(B, M, N, dtype=torch.float32)
    tile = tiles(M, q.dtype)
    with torch.cuda.device_of(x):
        multi_query_pool_fwd_kernel[(B, triton.cdiv(M, tile.queries))](
            x_ptr=x,
            q_ptr=q,
            mask_ptr=x if mask is None else mask.contiguous().view(torch.uint8),
            scales_ptr=_dense(scales, q),
            z_ptr=z,
            attention_ptr=attention,
            logits_ptr=logits,
            **_sizes(x, M),
            scale=D**-0.5 * LOG2_E,
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
    ds = q.new_empty(B, M, N, dtype=torch.float32)
    images = triton.cdiv(B * of_queries * of_channels, PROGRAMS)
    dq_partial = q.new_empty(triton.cdiv(B, images), M, D, dtype=torch.float32)
    dx = x.new_empty((B, N, D) if needs_x else 0)
    with torch.cuda.device_of(x):
        multi_query_pool_bwd_slope_kernel[(B, of_queries)](
            dz_ptr=grad_z,
            dp_ptr=_dense(grad_attention, attention),
            x_ptr=x,
            scales_ptr=_dense(scales, q),
            attention_ptr=attention,
            ds_ptr=ds,
            **_sizes(x, M),
            scale=D**-0.5,
            HAS_DP=grad_attention is not None,
            SCALED=scales is not None,
            **constants,
            **options,
        )
        multi_query_pool_bwd_q_kernel[(len(dq_partial), of_queries, of_channels)](
            ds_ptr=ds, x_ptr=x, dq_partial_ptr=dq_partial, B=B, **_sizes(x, M), images=images, **constants, **options
        )
        if needs_x:
            multi_query_pool_bwd_x_kernel[(B, triton.cdiv(N, of_tokens.tokens), of_channels)](
                dz_ptr=grad_z,
                q_ptr=q,
                attention_ptr=attention,
                ds_ptr=ds,
                dx_ptr=dx,
                M=M,
                N=N,
                D=D,
                **{**constants, **of_tokens.constants},
                **{**options, **of_tokens.options},
            )
    return dx, dq_partial.sum(0).to(q.dtype)


def _sizes(x: Tensor, M: int) -> dict[str, int]:
    """Sizes and strides of tokens, by the kernels' parameter names."""
    return {"M": M, "N": x.shape[1], "D": x.shape[2], "x_stride_b": x.stride(0), "x_stride_n": x.stride(1)}


def _dense(optional: Tensor | None, instead: Tensor) -> Tensor:
    """The argument, or another tensor if it is None: the kernel does not read that one."""
    return instead if optional is None else optional.contiguous()


def _with_dense_rows(x: Tensor) -> Tensor:
    """Tokens with contiguous channels."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
