"""Triton kernels of `visionattn.kernels.halo_attention`, which `halo_attention.py` launches.

A program has a tile of one block's queries for one head and goes over its window some rows at a time, each row padded
to a power of two, with a softmax that is corrected as larger logits come. Relative logits are gathered once for each
query, one for each row and column of its window, and reach the logits by products with 0 and 1: tensor cores have time
for that, registers have no room for a sum by broadcasting. What the border or padding shuts out has such a row or
column of a large negative number, finite, for infinity times 0 is NaN. In half precisions these vectors go as sums of
two bfloat16 ones, which hold 16 bits.

Backward, the forward kernel goes again, for what the others need of each query. A second kernel goes the same way for
the queries and the tables, of which each program leaves its part of the sum. A third one has tiles of keys, cut in
blocks that lie a halo up and left of those of queries: few blocks of queries see such a tile, two each way where the
halo is at most half a block. Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["halo_attention_bwd_kv_kernel", "halo_attention_bwd_q_kernel", "halo_attention_fwd_kernel"]

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
def _collect(total, slope, code, dot: tl.constexpr):
    """The gradient of `_spread` by the bias."""
    return tl.dot(slope, tl.trans(code.to(slope.dtype)), total, input_precision=dot)


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
    grad_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
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
    AGAIN: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output; or again, for the way back, what it is to each query's gradient, and its sum of exponentials.

    The former are sums of grad times out, of an output that is not rounded; the latter logarithms to base 2.
    """
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
    if AGAIN:
        grad = tl.load(grad_ptr + first * DV + place[:, None] * DV + dv[None, :], mask=mask, other=0.0)
        tl.store(delta_ptr + first + place, tl.sum(grad.to(tl.float32) * out, 1) / total, mask=asks)
        tl.store(lse_ptr + first + place, largest + tl.log2(total), mask=asks)
    else:
        tl.store(out_ptr + first * DV + place[:, None] * DV + dv[None, :], out / total[:, None], mask=mask)


@triton.jit
def halo_attention_bwd_q_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
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
    """The gradient by q, and each program's part of those by the tables."""
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
    delta = tl.load(delta_ptr + first + place, mask=asks, other=0.0)
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
        slope = slope.to(k.dtype)
        by_q = tl.dot(slope, k, by_q, input_precision=PRECISION)
        by_rows = _collect(by_rows, slope, row_code, PRECISION)
        by_columns = _collect(by_columns, slope, column_code, PRECISION)

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
