"""What the Triton kernels of halo attention share: tiles of a map, a program's queries, relative logits and masks."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "MASKED",
    "add_relative",
    "add_relative_grad",
    "map_tile",
    "offset",
    "queries",
    "query_block",
    "relative_logits",
    "to_table_rows",
    "window_logits",
]

MASKED = tl.constexpr(-1e30)


@triton.jit
def offset(image, y, x, head, stride_b, stride_y, stride_x, stride_h):
    """Where a pixel's channels begin: 64 bits for this alone, so that what is counted from there takes 32."""
    return image * stride_b + tl.cast(y, tl.int64) * stride_y + tl.cast(x, tl.int64) * stride_x + head * stride_h


@triton.jit
def map_tile(ptr, y, x, inside, stride_y, stride_x, offs_d, n_channels):
    """Pixels of a map by channels, zeros outside; y and x count from the pixel that `ptr` points to."""
    mask = inside[:, None] & (offs_d < n_channels)[None, :]
    return tl.load(ptr + (y * stride_y + x * stride_x)[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def relative_logits(
    q, table_ptr, position, offs_d, D, STEP: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, dot: tl.constexpr
):
    """Relative logits along an axis for each query and row or column of its window, times sqrt(D)."""
    rows = tl.arange(0, 2 * PADDED)
    mask = (rows < 2 * WINDOW - 1)[:, None] & (offs_d < D)[None, :]
    table = tl.load(table_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    qk = tl.dot(q, tl.trans(table), input_precision=dot)
    j = tl.arange(0, PADDED)
    row = WINDOW - 1 + j[None, :] - STEP * position[:, None]
    return tl.gather(qk, tl.minimum(tl.maximum(row, 0), 2 * PADDED - 1), 1) * tl.sqrt(D.to(tl.float32))


@triton.jit
def _mask_window(rel, first, size, MASK: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """Mask the padding of the window and, with a masked border, the positions outside the map."""
    j = tl.arange(0, PADDED)
    inside = j < WINDOW
    if MASK:
        inside = inside & (first + j >= 0) & (first + j < size)
    return tl.where(inside[None, :], rel, MASKED)


@triton.jit
def window_logits(
    q,
    height_ptr,
    width_ptr,
    iy,
    ix,
    offs_d,
    D,
    first_y,
    first_x,
    H,
    W,
    MASK: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    dot: tl.constexpr,
):
    """Masked relative logits of each query: one per row and one per column of its window."""
    rel_h = relative_logits(q, height_ptr, iy, offs_d, D, STEP, WINDOW, PADDED, dot)
    rel_h = _mask_window(rel_h, first_y, H, MASK, WINDOW, PADDED)
    rel_w = relative_logits(q, width_ptr, ix, offs_d, D, STEP, WINDOW, PADDED, dot)
    rel_w = _mask_window(rel_w, first_x, W, MASK, WINDOW, PADDED)
    return rel_h, rel_w


@triton.jit
def query_block(heads, ny, nx):
    """Head, row and column of the block, and image of a program over queries."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    bx, by, image = block % nx, (block // nx) % ny, (block // (nx * ny)).to(tl.int64)
    return head, by, bx, image


@triton.jit
def queries(offs_m, by, bx, QH, QW, SIDE: tl.constexpr, PITCH: tl.constexpr):
    """Row and column of each query within its block, and which queries exist."""
    iy, ix = offs_m // PITCH, offs_m % PITCH
    return iy, ix, (iy < SIDE) & (ix < SIDE) & (by * SIDE + iy < QH) & (bx * SIDE + ix < QW)


@triton.jit
def add_relative(qk, rel, onehot, HALF: tl.constexpr, dot: tl.constexpr):
    """Add to a tile of logits the relative logit of each query for the row or column of each key."""
    if HALF:
        high = rel.to(tl.bfloat16)
        low = (rel - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, onehot.to(tl.bfloat16), tl.dot(high, onehot.to(tl.bfloat16), qk))
    return tl.dot(rel, onehot.to(tl.float32), qk, input_precision=dot)


@triton.jit
def add_relative_grad(drel, ds, onehot, dot: tl.constexpr):
    """Add the gradient of `add_relative` by the relative logits."""
    return tl.dot(ds, tl.trans(onehot.to(ds.dtype)), drel, input_precision=dot)


@triton.jit
def to_table_rows(drel, position, STEP: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """From rows or columns of a query's window to rows of the table."""
    rows = tl.arange(0, 2 * PADDED)
    j = rows[None, :] - (WINDOW - 1) + STEP * position[:, None]
    found = tl.gather(drel, tl.minimum(tl.maximum(j, 0), PADDED - 1), 1)
    return tl.where((j >= 0) & (j < WINDOW) & (rows < 2 * WINDOW - 1)[None, :], found, 0.0)
