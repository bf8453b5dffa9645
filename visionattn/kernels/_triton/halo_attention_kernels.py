"""Triton kernels of `visionattn.kernels.halo_attention`, which `halo_attention.py` launches.

A program has a tile of one block's queries for one head. It loops over the window some rows at a time, each row padded
to a power of two, with an online softmax. Relative logits are gathered once per query, one for each row and column of
its window, and are added to the logits by products with one-hot matrices: tensor cores have time for that, registers
have no room for a sum by broadcasting. Masked positions have such a logit of a large negative number, finite, because
infinity times 0 is NaN. In half precisions these vectors are sums of two bfloat16 ones, which hold 16 bits.

Backward, the forward kernel recomputes delta and the log-sum-exp of each query. A second kernel loops like the first
one and computes dq and, for each program, partial gradients of the tables. A third one has tiles of keys, cut in blocks
that lie a halo up and left of those of queries: few blocks of queries see such a tile, two per axis where the halo is
at most half a block. There are no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionattn.kernels._triton.halo_attention_tiles import (
    MASKED,
    add_relative,
    add_relative_grad,
    map_tile,
    offset,
    queries,
    query_block,
    relative_logits,
    to_table_rows,
    window_logits,
)

__all__ = ["halo_attention_bwd_kv_kernel", "halo_attention_bwd_q_kernel", "halo_attention_fwd_kernel"]


@triton.jit
def halo_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    do_ptr,
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
    RECOMPUTE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output; with RECOMPUTE, delta and the log-sum-exp of each query for the backward pass instead.

    delta is the sum of do times the output before rounding; the log-sum-exp has base 2.
    """
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    head, by, bx, image = query_block(heads, ny, nx)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    iy, ix, q_mask = queries(offs_m, by, bx, QH, QW, SIDE, PITCH)
    offs_d, offs_dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    first_y, first_x = by * BLOCK - HALO, bx * BLOCK - HALO
    q_ptr += offset(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
    k_ptr += offset(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += offset(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)

    q = map_tile(q_ptr, iy, ix, q_mask, q_sy, q_sx, offs_d, D)
    rel_h, rel_w = window_logits(
        q, height_ptr, width_ptr, iy, ix, offs_d, D, first_y, first_x, H, W, MASK, STEP, WINDOW, PADDED, PRECISION
    )

    j, offs_n = tl.arange(0, PADDED), tl.arange(0, ROWS * PADDED)
    column_onehot = j[:, None] == (offs_n % PADDED)[None, :]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    for row in range(0, WINDOW, ROWS):
        jy = row + offs_n // PADDED
        ky, kx = first_y + jy, first_x + offs_n % PADDED
        k_mask = (jy < WINDOW) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        k = map_tile(k_ptr, jy, offs_n % PADDED, k_mask, k_sy, k_sx, offs_d, D)
        v = map_tile(v_ptr, jy, offs_n % PADDED, k_mask, v_sy, v_sx, offs_dv, DV)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        qk = add_relative(qk, rel_h, j[:, None] == jy[None, :], HALF, PRECISION)
        qk = add_relative(qk, rel_w, column_onehot, HALF, PRECISION) * scale
        if WINDOW % ROWS != 0:  # rows beyond the last have no logit that masks them
            qk = tl.where((jy < WINDOW)[None, :], qk, MASKED)
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.exp2(qk - m_ij[:, None])
        alpha = tl.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * alpha[:, None], input_precision=PRECISION)
        m_i = m_ij
    base = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
    offs_row = (iy * QW + ix) * heads
    mask = q_mask[:, None] & (offs_dv < DV)[None, :]
    if RECOMPUTE:
        do = tl.load(do_ptr + base * DV + offs_row[:, None] * DV + offs_dv[None, :], mask=mask, other=0.0)
        tl.store(delta_ptr + base + offs_row, tl.sum(do.to(tl.float32) * out, 1) / l_i, mask=q_mask)
        tl.store(lse_ptr + base + offs_row, m_i + tl.log2(l_i), mask=q_mask)
    else:
        tl.store(out_ptr + base * DV + offs_row[:, None] * DV + offs_dv[None, :], out / l_i[:, None], mask=mask)


@triton.jit
def halo_attention_bwd_q_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dheight_ptr,
    dwidth_ptr,
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
    BLOCK_M: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq, and each program's partial gradients of the two tables."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    head, by, bx, image = query_block(heads, ny, nx)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    iy, ix, q_mask = queries(offs_m, by, bx, QH, QW, SIDE, PITCH)
    offs_d, offs_dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    first_y, first_x = by * BLOCK - HALO, bx * BLOCK - HALO
    q_ptr += offset(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
    k_ptr += offset(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += offset(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)

    q = map_tile(q_ptr, iy, ix, q_mask, q_sy, q_sx, offs_d, D)
    base = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
    offs_row = (iy * QW + ix) * heads
    inside = q_mask[:, None] & (offs_dv < DV)[None, :]
    do = tl.load(do_ptr + base * DV + offs_row[:, None] * DV + offs_dv[None, :], mask=inside, other=0.0)
    delta = tl.load(delta_ptr + base + offs_row, mask=q_mask, other=0.0)
    lse = tl.load(
        lse_ptr + base + offs_row, mask=q_mask, other=float("inf")
    )  # queries that do not exist get weights of 0

    rel_h, rel_w = window_logits(
        q, height_ptr, width_ptr, iy, ix, offs_d, D, first_y, first_x, H, W, MASK, STEP, WINDOW, PADDED, PRECISION
    )

    j, offs_n = tl.arange(0, PADDED), tl.arange(0, ROWS * PADDED)
    column_onehot = j[:, None] == (offs_n % PADDED)[None, :]
    dq = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    drel_h = tl.zeros([BLOCK_M, PADDED], tl.float32)
    drel_w = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for row in range(0, WINDOW, ROWS):
        jy = row + offs_n // PADDED
        row_onehot = j[:, None] == jy[None, :]
        ky, kx = first_y + jy, first_x + offs_n % PADDED
        k_mask = (jy < WINDOW) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        k = map_tile(k_ptr, jy, offs_n % PADDED, k_mask, k_sy, k_sx, offs_d, D)
        v = map_tile(v_ptr, jy, offs_n % PADDED, k_mask, v_sy, v_sx, offs_dv, DV)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        qk = add_relative(qk, rel_h, row_onehot, HALF, PRECISION)
        qk = add_relative(qk, rel_w, column_onehot, HALF, PRECISION) * scale
        if WINDOW % ROWS != 0:
            qk = tl.where((jy < WINDOW)[None, :], qk, MASKED)
        p = tl.exp2(qk - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        drel_h = add_relative_grad(drel_h, ds, row_onehot, PRECISION)
        drel_w = add_relative_grad(drel_w, ds, column_onehot, PRECISION)

    dq = dq * (1 / tl.sqrt(D.to(tl.float32)))
    table = tl.arange(0, 2 * PADDED)
    mask = (table < 2 * WINDOW - 1)[:, None] & (offs_d < D)[None, :]
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * WINDOW - 1) * D
    entries = table[:, None] * D + offs_d[None, :]
    drel = to_table_rows(drel_h, iy, STEP, WINDOW, PADDED).to(q.dtype)
    rel = tl.load(height_ptr + entries, mask=mask, other=0.0)
    dq = tl.dot(drel, rel, dq, input_precision=PRECISION)
    dtable = tl.dot(tl.trans(drel), q, input_precision=PRECISION)
    tl.store(dheight_ptr + part + entries, dtable, mask=mask)
    drel = to_table_rows(drel_w, ix, STEP, WINDOW, PADDED).to(q.dtype)
    rel = tl.load(width_ptr + entries, mask=mask, other=0.0)
    dq = tl.dot(drel, rel, dq, input_precision=PRECISION)
    dtable = tl.dot(tl.trans(drel), q, input_precision=PRECISION)
    tl.store(dwidth_ptr + part + entries, dtable, mask=mask)
    tl.store(
        dq_ptr + base * D + offs_row[:, None] * D + offs_d[None, :], dq, mask=q_mask[:, None] & (offs_d < D)[None, :]
    )


@triton.jit
def halo_attention_bwd_kv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    height_ptr,
    width_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    BLOCK_M: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_PITCH: tl.constexpr,
    PADDED: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk and dv. Keys of a tile are numbered within blocks that begin a halo before those of queries."""
    WINDOW: tl.constexpr = BLOCK + 2 * HALO
    SIDE: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = (WINDOW + BLOCK - 1) // BLOCK  # blocks of keys that a window covers, each way
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    tx, ty, image = tile % key_nx, (tile // key_nx) % key_ny, (tile // (key_nx * key_ny)).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile_y, in_tile_x = offs_n // KEY_PITCH, offs_n % KEY_PITCH
    first_y, first_x = ty * BLOCK - HALO, tx * BLOCK - HALO
    ky, kx = first_y + in_tile_y, first_x + in_tile_x
    k_mask = (in_tile_y < BLOCK) & (in_tile_x < BLOCK) & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
    offs_d, offs_dv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    k_ptr += offset(image, first_y, first_x, head, k_sb, k_sy, k_sx, k_sh)
    v_ptr += offset(image, first_y, first_x, head, v_sb, v_sy, v_sx, v_sh)
    k = map_tile(k_ptr, in_tile_y, in_tile_x, k_mask, k_sy, k_sx, offs_d, D)
    v = map_tile(v_ptr, in_tile_y, in_tile_x, k_mask, v_sy, v_sx, offs_dv, DV)

    j = tl.arange(0, PADDED)
    dk = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD_DV], tl.float32)
    for by in range(tl.maximum(ty - REACH + 1, 0), tl.minimum(ty + 1, ny)):
        jy = (ty - by) * BLOCK + in_tile_y
        row_onehot = j[:, None] == jy[None, :]
        for bx in range(tl.maximum(tx - REACH + 1, 0), tl.minimum(tx + 1, nx)):
            jx = (tx - bx) * BLOCK + in_tile_x
            column_onehot = j[:, None] == jx[None, :]
            visible = k_mask & (jy < WINDOW) & (jx < WINDOW)
            q_block_ptr = q_ptr + offset(image, by * SIDE, bx * SIDE, head, q_sb, q_sy, q_sx, q_sh)
            base = ((image * QH + by * SIDE) * QW + bx * SIDE) * heads + head
            for start in range(0, SIDE * PITCH, BLOCK_M):
                offs_m = start + tl.arange(0, BLOCK_M)
                iy, ix, q_mask = queries(offs_m, by, bx, QH, QW, SIDE, PITCH)
                q = map_tile(q_block_ptr, iy, ix, q_mask, q_sy, q_sx, offs_d, D)
                offs_row = (iy * QW + ix) * heads
                inside = q_mask[:, None] & (offs_dv < DV)[None, :]
                do = tl.load(do_ptr + base * DV + offs_row[:, None] * DV + offs_dv[None, :], mask=inside, other=0.0)
                lse = tl.load(lse_ptr + base + offs_row, mask=q_mask, other=float("inf"))
                delta = tl.load(delta_ptr + base + offs_row, mask=q_mask, other=0.0)
                rel_h = relative_logits(q, height_ptr, iy, offs_d, D, STEP, WINDOW, PADDED, PRECISION)
                rel_w = relative_logits(q, width_ptr, ix, offs_d, D, STEP, WINDOW, PADDED, PRECISION)
                qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                qk = add_relative(qk, rel_h, row_onehot, HALF, PRECISION)
                qk = add_relative(qk, rel_w, column_onehot, HALF, PRECISION) * scale
                p = tl.exp2(tl.where(visible[None, :], qk - lse[:, None], float("-inf")))
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
                ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    dk = dk * (1 / tl.sqrt(D.to(tl.float32)))
    base = ((image * H + first_y) * W + first_x) * heads + head
    offs_row = (in_tile_y * W + in_tile_x) * heads
    dk_mask, dv_mask = k_mask[:, None] & (offs_d < D)[None, :], k_mask[:, None] & (offs_dv < DV)[None, :]
    tl.store(dk_ptr + base * D + offs_row[:, None] * D + offs_d[None, :], dk, mask=dk_mask)
    tl.store(dv_ptr + base * DV + offs_row[:, None] * DV + offs_dv[None, :], dv, mask=dv_mask)
