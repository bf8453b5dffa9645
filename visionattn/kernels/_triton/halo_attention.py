"""Triton kernels of `visionattn.kernels.halo_attention`.

A program has a tile of one block's queries for one head and goes over its window some rows at a time, each row padded
to a power of two, with a softmax that is corrected as larger logits come. Relative logits are gathered once for each
query, one for each row and column of its window, and reach the logits by products with 0 and 1: tensor cores have time
for that, registers have no room for a sum by broadcasting. What the border or padding shuts out has such a row or
column of a large negative number, finite, for infinity times 0 is NaN. In half precisions these vectors go as sums of
two bfloat16 ones, which hold 16 bits.

Backward, a first kernel goes the same way for the queries and the tables, of which each program leaves its part of the
sum. A second one has tiles of keys, cut in blocks that lie a halo up and left of those of queries: few blocks of
queries see such a tile, two each way where the halo is at most half a block. Nothing is added atomically.

Tensors whose channels do not lie side by side are copied. Float32 is multiplied in TF32 where
`torch.backends.cuda.matmul.allow_tf32` says so, else in three TF32 products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.halo_attention import _cropped

__all__ = [
    "OPTIONS",
    "Shape",
    "Tiles",
    "backward",
    "forward",
    "halo_attention_bwd_kv_kernel",
    "halo_attention_bwd_q_kernel",
    "halo_attention_fwd_kernel",
    "tiles_of_keys",
    "tiles_of_queries",
]

LOG2_E = math.log2(math.e)
OPTIONS = {"num_warps": 4, "num_stages": 1}
ALL_REGISTERS = {"maxnreg": 255}  # else ptxas keeps some bytes in memory to fit one program more
SHUT_OUT = tl.constexpr(-1e30)


@triton.jit
def _start(image, y, x, head, stride_b, stride_y, stride_x, stride_h):
    """Where a pixel's channels begin: 64 bits for this alone, so that what is counted from there takes 32."""
    return image * stride_b + tl.cast(y, tl.int64) * stride_y + tl.cast(x, tl.int64) * stride_x + head * stride_h


@triton.jit
def _map_tile(ptr, y, x, inside, stride_y, stride_x, d, n_channels):
    """Pixels of a map by channels, zeros outside; y and x count from the pixel that `ptr` points to."""
    mask = inside[:, None] & (d < n_channels)[None, :]
    return tl.load(ptr + (y * stride_y + x * stride_x)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _relative(q, table_ptr, i, d, D, STEP: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, dot: tl.constexpr):
    """Relative logits along an axis for each query and row or column of its window, times sqrt(D)."""
    rows = tl.arange(0, 2 * PADDED)
    mask = (rows < 2 * WINDOW - 1)[:, None] & (d < D)[None, :]
    table = tl.load(table_ptr + rows[:, None] * D + d[None, :], mask=mask, other=0.0)
    logits = tl.dot(q, tl.trans(table), input_precision=dot)
    j = tl.arange(0, PADDED)
    row = WINDOW - 1 + j[None, :] - STEP * i[:, None]
    return tl.gather(logits, tl.minimum(tl.maximum(row, 0), 2 * PADDED - 1), 1) * tl.sqrt(D.to(tl.float32))


@triton.jit
def _shut_out(bias, first, size, MASK: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Shut out what pads the window, and with a masked border what lies outside the map."""
    j = tl.arange(0, PADDED)
    present = j < WINDOW
    if MASK:
        present = present & (first + j >= 0) & (first + j < size)
    return tl.where(present[None, :], bias, SHUT_OUT)


@triton.jit
def _spread(logits, bias, code, HALF: tl.constexpr, dot: tl.constexpr):
    """Add to a tile of logits what each query has for the row or column of each key."""
    if HALF:
        high = bias.to(tl.bfloat16)
        low = (bias - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, code.to(tl.bfloat16), tl.dot(high, code.to(tl.bfloat16), logits))
    return tl.dot(bias, code.to(tl.float32), logits, input_precision=dot)


@triton.jit
def _collect(total, slope, code, HALF: tl.constexpr, dot: tl.constexpr):
    """The gradient of `_spread` by the bias."""
    if HALF:
        return tl.dot(slope.to(tl.bfloat16), tl.trans(code.to(tl.bfloat16)), total)
    return tl.dot(slope, tl.trans(code.to(tl.float32)), total, input_precision=dot)


@triton.jit
def _unshear(slope, i, STEP: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """From rows or columns of a query's window to rows of the table."""
    rows = tl.arange(0, 2 * PADDED)
    j = rows[None, :] - (WINDOW - 1) + STEP * i[:, None]
    found = tl.gather(slope, tl.minimum(tl.maximum(j, 0), PADDED - 1), 1)
    return tl.where((j >= 0) & (j < WINDOW) & (rows < 2 * WINDOW - 1)[None, :], found, 0.0)


@triton.jit
def halo_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    out_ptr,
    lse_ptr,
    heads,
    H,
    W,
    QH,
    QW,
    ny,
    nx,
    D,
    DV,
    q_sb,
    q_sy,
    q_sx,
    q_sh,
    k_sb,
    k_sy,
    k_sx,
    k_sh,
    v_sb,
    v_sy,
    v_sx,
    v_sh,
    scale,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    MASK: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output and the logarithm, to base 2, of each query's sum of exponentials."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    bx, by, image = block % nx, (block // nx) % ny, (block // (nx * ny)).to(tl.int64)
    i = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    iy, ix = i // PITCH, i % PITCH
    asks = (iy < SIDE) & (ix < SIDE) & (by * SIDE + iy < QH) & (bx * SIDE + ix < QW)
    d, dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    first_y, first_x = by * BLOCK - HALO, bx * BLOCK - HALO
    q_ptr += _start(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
    k_ptr += _start(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += _start(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)

    q = _map_tile(q_ptr, iy, ix, asks, q_sy, q_sx, d, D)
    of_rows = _relative(q, height_ptr, iy, d, D, STEP, WINDOW, PADDED, PRECISION)
    of_rows = _shut_out(of_rows, first_y, H, MASK, WINDOW, PADDED)
    of_columns = _relative(q, width_ptr, ix, d, D, STEP, WINDOW, PADDED, PRECISION)
    of_columns = _shut_out(of_columns, first_x, W, MASK, WINDOW, PADDED)

    j, key = tl.arange(0, PADDED), tl.arange(0, ROWS * PADDED)
    column_code = j[:, None] == (key % PADDED)[None, :]
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, PAD_DV], tl.float32)
    for row in range(0, WINDOW, ROWS):
        jy = row + key // PADDED
        ky, kx = first_y + jy, first_x + key % PADDED
        present = (jy < WINDOW) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        k = _map_tile(k_ptr, jy, key % PADDED, present, k_sy, k_sx, d, D)
        v = _map_tile(v_ptr, jy, key % PADDED, present, v_sy, v_sx, dv, DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _spread(logits, of_rows, j[:, None] == jy[None, :], HALF, PRECISION)
        logits = _spread(logits, of_columns, column_code, HALF, PRECISION) * scale
        if WINDOW % ROWS != 0:  # rows beyond the last have no code to shut them out
            logits = tl.where((jy < WINDOW)[None, :], logits, SHUT_OUT)
        new = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - new[:, None])
        fading = tl.exp2(largest - new)
        total = total * fading + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * fading[:, None], input_precision=PRECISION)
        largest = new
    first = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
    place = (iy * QW + ix) * heads
    mask = asks[:, None] & (dv < DV)[None, :]
    tl.store(out_ptr + first * DV + place[:, None] * DV + dv[None, :], out / total[:, None], mask=mask)
    tl.store(lse_ptr + first + place, largest + tl.log2(total), mask=asks)


@triton.jit
def halo_attention_bwd_q_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    by_q_ptr,
    by_height_ptr,
    by_width_ptr,
    heads,
    H,
    W,
    QH,
    QW,
    ny,
    nx,
    D,
    DV,
    q_sb,
    q_sy,
    q_sx,
    q_sh,
    k_sb,
    k_sy,
    k_sx,
    k_sh,
    v_sb,
    v_sy,
    v_sx,
    v_sh,
    scale,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    MASK: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient by q, each program's part of those by the tables, and the sums of grad times out."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    bx, by, image = block % nx, (block // nx) % ny, (block // (nx * ny)).to(tl.int64)
    i = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    iy, ix = i // PITCH, i % PITCH
    asks = (iy < SIDE) & (ix < SIDE) & (by * SIDE + iy < QH) & (bx * SIDE + ix < QW)
    d, dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    first_y, first_x = by * BLOCK - HALO, bx * BLOCK - HALO
    q_ptr += _start(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
    k_ptr += _start(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += _start(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)

    q = _map_tile(q_ptr, iy, ix, asks, q_sy, q_sx, d, D)
    first = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
    place = (iy * QW + ix) * heads
    inside = asks[:, None] & (dv < DV)[None, :]
    grad = tl.load(grad_ptr + first * DV + place[:, None] * DV + dv[None, :], mask=inside, other=0.0)
    out = tl.load(out_ptr + first * DV + place[:, None] * DV + dv[None, :], mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + first + place, delta, mask=asks)
    lse = tl.load(lse_ptr + first + place, mask=asks, other=float("inf"))  # weights of 0 for who does not ask

    of_rows = _relative(q, height_ptr, iy, d, D, STEP, WINDOW, PADDED, PRECISION)
    of_rows = _shut_out(of_rows, first_y, H, MASK, WINDOW, PADDED)
    of_columns = _relative(q, width_ptr, ix, d, D, STEP, WINDOW, PADDED, PRECISION)
    of_columns = _shut_out(of_columns, first_x, W, MASK, WINDOW, PADDED)

    j, key = tl.arange(0, PADDED), tl.arange(0, ROWS * PADDED)
    column_code = j[:, None] == (key % PADDED)[None, :]
    by_q = tl.zeros([QUERIES, PAD_D], tl.float32)
    by_rows = tl.zeros([QUERIES, PADDED], tl.float32)
    by_columns = tl.zeros([QUERIES, PADDED], tl.float32)
    for row in range(0, WINDOW, ROWS):
        jy = row + key // PADDED
        row_code = j[:, None] == jy[None, :]
        ky, kx = first_y + jy, first_x + key % PADDED
        present = (jy < WINDOW) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        k = _map_tile(k_ptr, jy, key % PADDED, present, k_sy, k_sx, d, D)
        v = _map_tile(v_ptr, jy, key % PADDED, present, v_sy, v_sx, dv, DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _spread(logits, of_rows, row_code, HALF, PRECISION)
        logits = _spread(logits, of_columns, column_code, HALF, PRECISION) * scale
        if WINDOW % ROWS != 0:
            logits = tl.where((jy < WINDOW)[None, :], logits, SHUT_OUT)
        p = tl.exp2(logits - lse[:, None])
        slope = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        by_q = tl.dot(slope.to(k.dtype), k, by_q, input_precision=PRECISION)
        by_rows = _collect(by_rows, slope, row_code, HALF, PRECISION)
        by_columns = _collect(by_columns, slope, column_code, HALF, PRECISION)

    by_q = by_q * (1 / tl.sqrt(D.to(tl.float32)))
    table = tl.arange(0, 2 * PADDED)
    mask = (table < 2 * WINDOW - 1)[:, None] & (d < D)[None, :]
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * WINDOW - 1) * D
    entries = table[:, None] * D + d[None, :]
    sheared = _unshear(by_rows, iy, STEP, WINDOW, PADDED).to(q.dtype)
    rel = tl.load(height_ptr + entries, mask=mask, other=0.0)
    by_q = tl.dot(sheared, rel, by_q, input_precision=PRECISION)
    by_table = tl.dot(tl.trans(sheared), q, input_precision=PRECISION)
    tl.store(by_height_ptr + part + entries, by_table, mask=mask)
    sheared = _unshear(by_columns, ix, STEP, WINDOW, PADDED).to(q.dtype)
    rel = tl.load(width_ptr + entries, mask=mask, other=0.0)
    by_q = tl.dot(sheared, rel, by_q, input_precision=PRECISION)
    by_table = tl.dot(tl.trans(sheared), q, input_precision=PRECISION)
    tl.store(by_width_ptr + part + entries, by_table, mask=mask)
    tl.store(by_q_ptr + first * D + place[:, None] * D + d[None, :], by_q, mask=asks[:, None] & (d < D)[None, :])


@triton.jit
def halo_attention_bwd_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    lse_ptr,
    delta_ptr,
    by_k_ptr,
    by_v_ptr,
    heads,
    H,
    W,
    QH,
    QW,
    ny,
    nx,
    key_ny,
    key_nx,
    D,
    DV,
    q_sb,
    q_sy,
    q_sx,
    q_sh,
    k_sb,
    k_sy,
    k_sx,
    k_sh,
    v_sb,
    v_sy,
    v_sx,
    v_sh,
    scale,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    PITCH: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_PITCH: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients by k and v. Keys of a tile are numbered within blocks that begin a halo before those of queries."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK  # blocks of keys that a window covers, each way
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tx, ty, image = tile % key_nx, (tile // key_nx) % key_ny, (tile // (key_nx * key_ny)).to(tl.int64)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_tile_y, in_tile_x = key // KEY_PITCH, key % KEY_PITCH
    first_y, first_x = ty * BLOCK - HALO, tx * BLOCK - HALO
    ky, kx = first_y + in_tile_y, first_x + in_tile_x
    present = (in_tile_y < BLOCK) & (in_tile_x < BLOCK) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
    d, dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    k_ptr += _start(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += _start(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)
    k = _map_tile(k_ptr, in_tile_y, in_tile_x, present, k_sy, k_sx, d, D)
    v = _map_tile(v_ptr, in_tile_y, in_tile_x, present, v_sy, v_sx, dv, DV)

    j = tl.arange(0, PADDED)
    by_k = tl.zeros([KEYS, PAD_D], tl.float32)
    by_v = tl.zeros([KEYS, PAD_DV], tl.float32)
    for by in range(tl.maximum(ty - REACH + 1, 0), tl.minimum(ty + 1, ny)):
        jy = (ty - by) * BLOCK + in_tile_y
        row_code = j[:, None] == jy[None, :]
        for bx in range(tl.maximum(tx - REACH + 1, 0), tl.minimum(tx + 1, nx)):
            jx = (tx - bx) * BLOCK + in_tile_x
            column_code = j[:, None] == jx[None, :]
            seen = present & (jy < WINDOW) & (jx < WINDOW)
            of_block = q_ptr + _start(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
            first = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
            for start in range(0, SIDE * PITCH, QUERIES):
                i = start + tl.arange(0, QUERIES)
                iy, ix = i // PITCH, i % PITCH
                asks = (iy < SIDE) & (ix < SIDE) & (by * SIDE + iy < QH) & (bx * SIDE + ix < QW)
                q = _map_tile(of_block, iy, ix, asks, q_sy, q_sx, d, D)
                place = (iy * QW + ix) * heads
                inside = asks[:, None] & (dv < DV)[None, :]
                grad = tl.load(grad_ptr + first * DV + place[:, None] * DV + dv[None, :], mask=inside, other=0.0)
                lse = tl.load(lse_ptr + first + place, mask=asks, other=float("inf"))
                delta = tl.load(delta_ptr + first + place, mask=asks, other=0.0)
                of_rows = _relative(q, height_ptr, iy, d, D, STEP, WINDOW, PADDED, PRECISION)
                of_columns = _relative(q, width_ptr, ix, d, D, STEP, WINDOW, PADDED, PRECISION)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                logits = _spread(logits, of_rows, row_code, HALF, PRECISION)
                logits = _spread(logits, of_columns, column_code, HALF, PRECISION) * scale
                p = tl.exp2(tl.where(seen[None, :], logits - lse[:, None], float("-inf")))
                by_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, by_v, input_precision=PRECISION)
                slope = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                by_k = tl.dot(tl.trans(slope.to(q.dtype)), q, by_k, input_precision=PRECISION)
    by_k = by_k * (1 / tl.sqrt(D.to(tl.float32)))
    first = ((image * H + first_y) * W + first_x) * heads + head
    place = (in_tile_y * W + in_tile_x) * heads
    of_k, of_v = present[:, None] & (d < D)[None, :], present[:, None] & (dv < DV)[None, :]
    tl.store(by_k_ptr + first * D + place[:, None] * D + d[None, :], by_k, mask=of_k)
    tl.store(by_v_ptr + first * DV + place[:, None] * DV + dv[None, :], by_v, mask=of_v)


class Tiles(NamedTuple):
    """What a kernel is compiled with, and how many tiles of its own a block has."""

    count: int
    constants: dict[str, int]
    options: dict[str, int]


class Shape(NamedTuple):
    """What tiles depend on."""

    D: int
    DV: int
    block_size: int
    halo_size: int
    stride: int
    dtype: torch.dtype
    from_shared: bool  # whether the chip's tensor cores read matrices from shared memory, which spares registers

    @property
    def wide(self) -> int:
        return max(self.D, self.DV)

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.block_size + 2 * self.halo_size))

    @property
    def constants(self) -> dict[str, int]:
        widths = (max(16, triton.next_power_of_2(width)) for width in (self.D, self.DV))
        return {"PADDED": self.padded, **dict(zip(("PAD_D", "PAD_DV"), widths))}


# The largest tiles whose kernels hold everything in registers on sm_80, sm_90 and sm_100 in half precisions
# (benchmarks/kernel_resources.py), and the fewest instructions a pair of a query and a key among those. 16 is the least
# that tensor cores take of anything.


def tiles_of_queries(shape: Shape, backward: bool) -> Tiles:
    """Tiles of the kernels whose programs have queries and go over a window, some keys at a time."""
    wide, padded = shape.wide, shape.padded
    if shape.dtype == torch.float32:
        queries = keys = 32 if wide <= 32 and not backward else 16
    elif not backward:
        queries = keys = 64
    elif wide > 64 and padded > 16 and not shape.from_shared:
        queries, keys = 16, 32
    else:
        queries, keys = 64, 64 if wide <= 16 else 32 if wide <= 64 else 16
    count, queries, pitch = _numbered(shape.block_size // shape.stride, queries)
    constants = {"QUERIES": queries, "PITCH": pitch, "ROWS": max(1, keys // padded)}
    many = (backward or shape.dtype == torch.float32) and (wide > 32 or padded > 16)
    return Tiles(count, shape.constants | constants, OPTIONS | (ALL_REGISTERS if many else {}))


def tiles_of_keys(shape: Shape) -> Tiles:
    """Tiles of the kernel whose programs have keys and go over the queries that see them."""
    wide, padded = shape.wide, shape.padded
    side = shape.block_size // shape.stride
    warps = OPTIONS["num_warps"]
    if shape.dtype == torch.float32:
        queries = keys = 16
    elif wide > 64:
        queries, keys, warps = 32, 64, 8
    elif wide > 32 and (padded > 16 or not shape.from_shared):
        queries, keys, warps = 32, 32, 2 if padded == 16 else 4
    else:
        even = _numbered(side, 64)[2] == triton.next_power_of_2(side)
        queries, keys = 64 if padded == 16 and (wide <= 32 or even) else 32, 64
    _, queries, pitch = _numbered(side, queries)
    count, keys, key_pitch = _numbered(shape.block_size, keys)
    constants = {"QUERIES": queries, "PITCH": pitch, "KEYS": keys, "KEY_PITCH": key_pitch}
    return Tiles(count, shape.constants | constants, OPTIONS | ALL_REGISTERS | {"num_warps": warps})


def _numbered(side: int, most: int) -> tuple[int, int, int]:
    """How a block's pixels are cut into tiles: how many, how large, and numbers from one row of the block to the next.

    That pitch is a power of two where it takes no more tiles: other divisions cost registers and a tenth of the time.
    """
    size = min(most, max(16, triton.next_power_of_2(side * side)))
    count, pitch = triton.cdiv(side * side, size), triton.next_power_of_2(side)
    return count, size, pitch if triton.cdiv(side * pitch, size) == count else side


def precision(dtype: torch.dtype) -> str:
    """How products of tensors of a dtype are computed; that of half precisions is given by the dtype."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _from_shared(device: torch.device) -> bool:
    """`wgmma` and `tcgen05` take matrices from shared memory; `mma.sync` of other generations takes registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10, 11)


class _Call:
    """One call's arguments, and the kernels over them."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> None:
        self.maps = [_dense(x) for x in (q, k, v)]
        self.tables = height_rel.contiguous(), width_rel.contiguous()
        (self.B, self.heads, D, H, W), DV = k.shape, v.shape[2]
        self.shape = Shape(D, DV, block_size, halo_size, stride, q.dtype, _from_shared(q.device))
        self.grid = -(-H // block_size), -(-W // block_size)
        self.key_grid = -(-(H + halo_size) // block_size), -(-(W + halo_size) // block_size)
        self.sizes = (self.heads, H, W, *q.shape[3:])
        strides = [stride for x in self.maps for stride in (x.stride(0), x.stride(3), x.stride(4), x.stride(1))]
        self.layout = (D, DV, *strides, D**-0.5 * LOG2_E)
        self.masked = border == "mask"
        self.constants = {
            "BLOCK": block_size,
            "HALO": halo_size,
            "STRIDE": stride,
            "STEP": stride if index == "offset" else 1,
            "HALF": q.dtype != torch.float32,
            "PRECISION": precision(q.dtype),
            "enable_fp_fusion": True,
        }

    def windows(self, tiles: Tiles) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and constants of a kernel over queries and their windows."""
        grid = self.B * self.grid[0] * self.grid[1] * self.heads, tiles.count
        return grid, {"MASK": self.masked, **tiles.constants, **tiles.options, **self.constants}

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (B, H', W', heads, Dv) and the logarithms (B, H', W', heads)."""
        q, _, v = self.maps
        out = q.new_empty(self.B, *q.shape[3:], self.heads, v.shape[2])
        lse = q.new_empty(out.shape[:4], dtype=torch.float32)
        grid, constants = self.windows(tiles_of_queries(self.shape, backward=False))
        with torch.cuda.device_of(q):
            halo_attention_fwd_kernel[grid](
                *self.maps, *self.tables, out, lse, *self.sizes, *self.grid, *self.layout, **constants
            )
        return out, lse

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients by q, k and v, channels-last, and by the tables."""
        out, lse = self.forward()
        grad, delta = grad.permute(0, 3, 4, 1, 2).contiguous(), torch.empty_like(lse)
        by_maps = [x.new_empty(self.B, *x.shape[3:], self.heads, x.shape[2]) for x in self.maps]
        grid, constants = self.windows(tiles_of_queries(self.shape, backward=True))
        parts = [table.new_empty(*grid, *table.shape, dtype=torch.float32) for table in self.tables]
        of_keys = tiles_of_keys(self.shape)
        key_grid = self.B * self.key_grid[0] * self.key_grid[1] * self.heads, of_keys.count
        with torch.cuda.device_of(grad):
            halo_attention_bwd_q_kernel[grid](
                *(grad, *self.maps, *self.tables, out, lse, delta, by_maps[0], *parts),
                *(*self.sizes, *self.grid, *self.layout),
                **constants,
            )
            halo_attention_bwd_kv_kernel[key_grid](
                *(grad, *self.maps, *self.tables, lse, delta, *by_maps[1:]),
                *(*self.sizes, *self.grid, *self.key_grid, *self.layout),
                **of_keys.constants,
                **of_keys.options,
                **self.constants,
            )
        by_tables = (part.sum((0, 1)).to(table.dtype) for part, table in zip(parts, self.tables))
        return *(x.permute(0, 3, 4, 1, 2) for x in by_maps), *by_tables


def _dense(x: Tensor) -> Tensor:
    """Give a map (B, heads, channels, height, width) whose channels lie side by side."""
    if x.stride(2) == 1 or x.shape[2] == 1:
        return x
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    border: str,
    index: str,
) -> Tensor:
    """Launch the forward kernel. Any strides; the result is laid out like q."""
    out, _ = _Call(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index).forward()
    return _cropped(out.permute(0, 3, 4, 1, 2), q)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    border: str,
    index: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel again, then the backward kernels. Any strides; the results are laid out as given."""
    call = _Call(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    *by_maps, by_height, by_width = call.backward(grad)
    by_q, by_k, by_v = (_cropped(by, x) for by, x in zip(by_maps, (q, k, v)))
    return by_q, by_k, by_v, by_height, by_width
