"""Triton kernels of `visionattn.kernels.match_attention`.

A thread has one query of one head and all keys of its window, with the score of each key in a register of its own:
sub-windows are then known at compile time, and threads synchronise only where attention is stored and its gradient is
loaded. Channels are loaded 16 bytes at a time. A query is loaded again for each key, from the L1 cache.

Backward, a first kernel recomputes the same and writes dq, the gradient of the field, and the attention and ds of each
query. A second kernel gathers, for each key, the contributions of all queries whose window contains it: queries are
sorted stably by the first position of their window, and a key loops over the list of each window that contains it.
There are no atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["match_attention_bwd_kv_kernel", "match_attention_bwd_q_kernel", "match_attention_fwd_kernel"]


@triton.jit
def _window_start(position, size, last, RADIUS: tl.constexpr):
    """First pixel of the window along an axis, the fraction of its centre, and whether the centre is not clamped."""
    free = (position >= RADIUS) & (position <= last)
    centre = tl.where(position > last, last, tl.where(position < RADIUS, RADIUS * 1.0, position))
    # Again, for NaN.
    whole = tl.minimum(tl.maximum(tl.floor(centre).to(tl.int32), RADIUS), size - 2 - RADIUS)
    return whole - RADIUS, centre - whole.to(tl.float32), free


@triton.jit
def _window(
    field_ptr,
    n,
    count,
    H,
    W,
    last_y,
    last_x,
    HEADS: tl.constexpr,
    FIELD_HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
):
    """The row of a query's first key, the fractions u and v, and whether x and y of its centre are not clamped."""
    token = n // HEADS
    at = token * FIELD_HEADS + n % HEADS if FIELD_HEADS > 1 else token
    rho_x = tl.load(field_ptr + 2 * at, mask=n < count, other=0.0).to(tl.float32)
    rho_y = tl.load(field_ptr + 2 * at + 1, mask=n < count, other=0.0).to(tl.float32)
    x, y = (token % W).to(tl.int32), ((token // W) % H).to(tl.int32)
    left, u, free_x = _window_start(x.to(tl.float32) + rho_x, W, last_x, RADIUS)
    top, v, free_y = _window_start(y.to(tl.float32) + rho_y, H, last_y, RADIUS)
    first = n + ((top - y) * W + left - x).to(tl.int64) * HEADS
    return first, u, v, free_x, free_y


@triton.jit
def _chunk_ptrs(ptr, row, mask, c, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to CHUNK channels from c on of rows of a table, (BLOCK, CHUNK), and which of them exist."""
    d = c + tl.arange(0, CHUNK)
    return ptr + (row * WIDTH)[:, None] + d[None, :], mask[:, None] & (d < WIDTH)[None, :]


@triton.jit
def _load_chunk(ptr, row, mask, c, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK channels from c on of rows of a table, (BLOCK, CHUNK) in float32, zeros outside."""
    ptrs, inside = _chunk_ptrs(ptr, row, mask, c, WIDTH, CHUNK)
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_key_chunk(ptrs, inside, m: tl.constexpr, W, SIDE: tl.constexpr, STEP: tl.constexpr):
    """The channels of key m: the keys of a window lie at constant offsets from the first one of their row."""
    return tl.load(ptrs + (m // SIDE) * (W * STEP) + (m % SIDE) * STEP, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add_products(
    totals,
    a_ptr,
    b_ptr,
    n,
    first,
    mask,
    W,
    channels,
    HEADS: tl.constexpr,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """Add to the total of each key the product of a with the row of b there, or their negative L1 distance."""
    for c in range(0, channels, CHUNK):
        a = _load_chunk(a_ptr, n, mask, c, WIDTH, CHUNK)
        ptrs, inside = _chunk_ptrs(b_ptr, first, mask, c, WIDTH, CHUNK)
        sums = ()
        for m in tl.static_range(SIDE * SIDE):
            b = _load_key_chunk(ptrs, inside, m, W, SIDE, HEADS * WIDTH)
            if DISTANCE:
                sums = sums + (totals[m] - tl.sum(tl.abs(a - b), 1),)
            else:
                sums = sums + (totals[m] + tl.sum(a * b, 1),)
        totals = sums
    return totals


@triton.jit
def _zeros(BLOCK: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
def _scores(
    q_ptr,
    k_ptr,
    n,
    first,
    mask,
    W,
    channels,
    scale,
    HEADS: tl.constexpr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores of the keys of a window, one tensor per key."""
    sums = _zeros(BLOCK, SIDE * SIDE)
    sums = _add_products(sums, q_ptr, k_ptr, n, first, mask, W, channels, HEADS, SIDE, D, CHUNK, L1)
    scores = ()
    for m in tl.static_range(SIDE * SIDE):
        scores = scores + (sums[m] * scale,)
    return scores


@triton.jit
def _sub_window_entry(values, t: tl.constexpr, i: tl.constexpr, SIDE: tl.constexpr):
    """Entry i of sub-window t (nw, ne, sw, se)."""
    return values[(i // (SIDE - 1) + t // 2) * SIDE + i % (SIDE - 1) + t % 2]


@triton.jit
def _sub_windows(scores, SIDE: tl.constexpr):
    """The maximum score of each sub-window, and the inverse of its sum of exponentials."""
    maxima, inverse_sums = (), ()
    for t in tl.static_range(4):
        maximum = _sub_window_entry(scores, t, 0, SIDE)
        for i in tl.static_range(1, (SIDE - 1) * (SIDE - 1)):
            maximum = tl.maximum(maximum, _sub_window_entry(scores, t, i, SIDE))
        total = tl.zeros_like(maximum)
        for i in tl.static_range((SIDE - 1) * (SIDE - 1)):
            total += tl.exp(_sub_window_entry(scores, t, i, SIDE) - maximum)
        maxima = maxima + (maximum,)
        inverse_sums = inverse_sums + (1 / total,)
    return maxima, inverse_sums


@triton.jit
def _weights(u, v):
    return (1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v


@triton.jit
def _attention(m: tl.constexpr, scores, maxima, inverse_sums, weights, SIDE: tl.constexpr):
    """The attention weight of key m of the window."""
    total = tl.zeros_like(maxima[0])
    for t in tl.static_range(4):
        dy = m // SIDE - t // 2
        dx = m % SIDE - t % 2
        if (dy >= 0) & (dy < SIDE - 1) & (dx >= 0) & (dx < SIDE - 1):
            total += weights[t] * inverse_sums[t] * tl.exp(scores[m] - maxima[t])
    return total


@triton.jit
def _join(values, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Every STEP-th of the tensors from FIRST on, COUNT of them, as one: (BLOCK, 2, ..., 2), lowest bit last."""
    if COUNT == 1:
        tile = values[FIRST]
    else:
        even = _join(values, FIRST, 2 * STEP, COUNT // 2)
        tile = tl.join(even, _join(values, FIRST + STEP, 2 * STEP, COUNT // 2))
    return tile


@triton.jit
def _split_columns(tile, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """The columns of a tile (BLOCK, COUNT), one tensor per column."""
    if COUNT == 1:
        columns = (tl.reshape(tile, [BLOCK]),)
    else:
        # The right half apart from the left one first: then a tile changes threads once, not each of its parts.
        left, right = tl.split(tl.permute(tl.reshape(tile, [BLOCK, 2, COUNT // 2]), (0, 2, 1)))
        columns = _split_columns(left, BLOCK, COUNT // 2) + _split_columns(right, BLOCK, COUNT // 2)
    return columns


# The table of attention has one row per query. A thread has a row: on its own it would access 2 bytes at a time, far
# from those of its neighbours. Tiles are exchanged through shared memory, so that accesses are 16 bytes wide. Radius 2
# has 36 keys = 32 + 4.


@triton.jit
def _store_rows(ptr, values, n, mask, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Store one tensor per key as rows of a table (queries, keys)."""
    MOST: tl.constexpr = SIDE * SIDE // 16 * 16
    REST: tl.constexpr = SIDE * SIDE - MOST
    at = (ptr + n * (SIDE * SIDE))[:, None]
    tile = tl.reshape(_join(values, 0, 1, MOST), [BLOCK, MOST])
    tl.store(at + tl.arange(0, MOST)[None, :], tile, mask=mask[:, None])
    if REST > 0:
        tile = tl.reshape(_join(values, MOST, 1, REST), [BLOCK, REST])
        tl.store(at + MOST + tl.arange(0, REST)[None, :], tile, mask=mask[:, None])


@triton.jit
def _load_rows(ptr, n, mask, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a table (queries, keys) as one tensor per key, in float32."""
    MOST: tl.constexpr = SIDE * SIDE // 16 * 16
    REST: tl.constexpr = SIDE * SIDE - MOST
    at = (ptr + n * (SIDE * SIDE))[:, None]
    tile = tl.load(at + tl.arange(0, MOST)[None, :], mask=mask[:, None], other=0.0)
    values = _split_columns(tile.to(tl.float32), BLOCK, MOST)
    if REST > 0:
        tile = tl.load(at + MOST + tl.arange(0, REST)[None, :], mask=mask[:, None], other=0.0)
        values = values + _split_columns(tile.to(tl.float32), BLOCK, REST)
    return values


@triton.jit
def match_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    field_ptr,
    out_ptr,
    attention_ptr,
    count,
    H,
    W,
    last_y,
    last_x,
    channels,
    value_channels,
    scale,
    HEADS: tl.constexpr,
    FIELD_HEADS: tl.constexpr,
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
    first, u, v, _, _ = _window(field_ptr, n, count, H, W, last_y, last_x, HEADS, FIELD_HEADS, RADIUS)
    scores = _scores(q_ptr, k_ptr, n, first, mask, W, channels, scale, HEADS, SIDE, D, CHUNK, L1, BLOCK)
    maxima, inverse_sums = _sub_windows(scores, SIDE)
    weights = _weights(u, v)
    attention = ()
    for m in tl.static_range(SIDE * SIDE):
        attention = attention + (_attention(m, scores, maxima, inverse_sums, weights, SIDE),)
    _store_rows(attention_ptr, attention, n, mask, SIDE, BLOCK)
    for c in range(0, value_channels, CHUNK):
        ptrs, inside = _chunk_ptrs(v_ptr, first, mask, c, DV, CHUNK)
        out = tl.zeros([BLOCK, CHUNK], tl.float32)
        for m in tl.static_range(SIDE * SIDE):
            out += attention[m][:, None] * _load_key_chunk(ptrs, inside, m, W, SIDE, HEADS * DV)
        ptrs, inside = _chunk_ptrs(out_ptr, n, mask, c, DV, CHUNK)
        tl.store(ptrs, out, mask=inside)


@triton.jit
def match_attention_bwd_q_kernel(
    do_ptr,
    dp_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    field_ptr,
    first_ptr,
    attention_ptr,
    ds_ptr,
    dq_ptr,
    dfield_ptr,
    count,
    H,
    W,
    last_y,
    last_x,
    channels,
    value_channels,
    scale,
    HAS_DO: tl.constexpr,
    HAS_DP: tl.constexpr,
    HEADS: tl.constexpr,
    FIELD_HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of q and of the field of each head; rows of first keys, the attention, and ds over sqrt(D).

    The last two are for the other backward kernel: (keys, queries), so that accesses of neighbouring threads coalesce.
    """
    SIDE: tl.constexpr = 2 * RADIUS + 2
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    first, u, v, free_x, free_y = _window(field_ptr, n, count, H, W, last_y, last_x, HEADS, FIELD_HEADS, RADIUS)
    scores = _scores(q_ptr, k_ptr, n, first, mask, W, channels, scale, HEADS, SIDE, D, CHUNK, L1, BLOCK)
    dp = _zeros(BLOCK, SIDE * SIDE)
    if HAS_DO:
        dp = _add_products(dp, do_ptr, v_ptr, n, first, mask, W, value_channels, HEADS, SIDE, DV, CHUNK, False)
    if HAS_DP:
        given, sums = _load_rows(dp_ptr, n, mask, SIDE, BLOCK), ()
        for m in tl.static_range(SIDE * SIDE):
            sums = sums + (dp[m] + given[m],)
        dp = sums
    # After the products: the exponentials of all sub-windows stay in registers and would not fit next to the products.
    maxima, inverse_sums = _sub_windows(scores, SIDE)
    weights = _weights(u, v)
    dweights = ()
    for t in tl.static_range(4):
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range((SIDE - 1) * (SIDE - 1)):
            total += tl.exp(_sub_window_entry(scores, t, i, SIDE) - maxima[t]) * _sub_window_entry(dp, t, i, SIDE)
        dweights = dweights + (total * inverse_sums[t],)
    ds_of_keys = ()
    for m in tl.static_range(SIDE * SIDE):
        ds = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(4):
            dy = m // SIDE - t // 2
            dx = m % SIDE - t % 2
            if (dy >= 0) & (dy < SIDE - 1) & (dx >= 0) & (dx < SIDE - 1):
                p = inverse_sums[t] * tl.exp(scores[m] - maxima[t])
                ds += weights[t] * p * (dp[m] - dweights[t])
        ds *= scale
        tl.store(ds_ptr + m * count.to(tl.int64) + n, ds, mask=mask)
        a = _attention(m, scores, maxima, inverse_sums, weights, SIDE)
        tl.store(attention_ptr + m * count.to(tl.int64) + n, a, mask=mask)
        ds_of_keys = ds_of_keys + (ds,)

    du = (1 - v) * (dweights[1] - dweights[0]) + v * (dweights[3] - dweights[2])
    dv = (1 - u) * (dweights[2] - dweights[0]) + u * (dweights[3] - dweights[1])
    tl.store(dfield_ptr + 2 * n, tl.where(free_x, du, 0.0), mask=mask)
    tl.store(dfield_ptr + 2 * n + 1, tl.where(free_y, dv, 0.0), mask=mask)
    tl.store(first_ptr + n, first, mask=mask)
    for c in range(0, channels, CHUNK):
        q, dq = _load_chunk(q_ptr, n, mask, c, D, CHUNK), tl.zeros([BLOCK, CHUNK], tl.float32)
        ptrs, inside = _chunk_ptrs(k_ptr, first, mask, c, D, CHUNK)
        for m in tl.static_range(SIDE * SIDE):
            k = _load_key_chunk(ptrs, inside, m, W, SIDE, HEADS * D)
            if L1:
                dq -= ds_of_keys[m][:, None] * _sign(q - k)
            else:
                dq += ds_of_keys[m][:, None] * k
        ptrs, inside = _chunk_ptrs(dq_ptr, n, mask, c, D, CHUNK)
        tl.store(ptrs, dq, mask=inside)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def match_attention_bwd_kv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    order_ptr,
    starts_ptr,
    attention_ptr,
    ds_ptr,
    dk_ptr,
    dv_ptr,
    count,
    H,
    W,
    HAS_DO: tl.constexpr,
    HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of CHUNK channels of k and v: sums over the queries of each list, in its order."""
    SIDE: tl.constexpr = 2 * RADIUS + 2
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * CHUNK
    mask = n < count
    x, y = (n // HEADS) % W, (n // HEADS // W) % H
    k = _load_chunk(k_ptr, n, mask, c, D, CHUNK)
    dk = tl.zeros([BLOCK, CHUNK], tl.float32)
    dv = tl.zeros([BLOCK, CHUNK], tl.float32)
    for m in range(SIDE * SIDE):
        dy, dx = m // SIDE, m % SIDE
        cell_mask = mask & (y >= dy) & (x >= dx)
        cell = n - (dy * W + dx) * HEADS
        at = tl.load(starts_ptr + cell, mask=cell_mask, other=0)
        end = tl.load(starts_ptr + cell + 1, mask=cell_mask, other=0)
        for _ in range(tl.max(end - at, 0)):
            active = at < end
            query = tl.load(order_ptr + at, mask=active, other=0)
            ds = tl.load(ds_ptr + m * count.to(tl.int64) + query, mask=active, other=0.0)
            q = _load_chunk(q_ptr, query, active, c, D, CHUNK)
            dk += ds[:, None] * (_sign(q - k) if L1 else q)
            if HAS_DO:
                a = tl.load(attention_ptr + m * count.to(tl.int64) + query, mask=active, other=0.0)
                dv += a[:, None] * _load_chunk(do_ptr, query, active, c, DV, CHUNK)
            at += 1
    ptrs, inside = _chunk_ptrs(dk_ptr, n, mask, c, D, CHUNK)
    tl.store(ptrs, dk, mask=inside)
    ptrs, inside = _chunk_ptrs(dv_ptr, n, mask, c, DV, CHUNK)
    tl.store(ptrs, dv, mask=inside)
