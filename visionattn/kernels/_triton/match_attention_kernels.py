"""Triton kernels of `visionattn.kernels.match_attention`.

A thread has one query of one head and all keys of its window, each key's score in a register of its own: sub-windows
are then known when the kernel is compiled, and threads wait for each other only where attention is stored and its
gradient loaded. Channels come 16 bytes at a time. A query is read again for each key, from the first-level cache.

Backward, a first kernel does the same again for the queries and the field, and leaves each query's attention and
slopes. Keys then collect what the queries that see them owe them: queries are sorted by where their window begins,
stably, and a key goes through the list of each window that holds it. Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["match_attention_bwd_kv_kernel", "match_attention_bwd_q_kernel", "match_attention_fwd_kernel"]


@triton.jit
def _begin(position, size, last, RADIUS: tl.constexpr):
    """First pixel of the window along an axis, how far the centre is from its integer neighbour, and if it is free."""
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
    """The row of a query's first key, the fractions u and v, and whether x and y of its centre are free."""
    token = n // HEADS
    at = token * FIELD_HEADS + n % HEADS if FIELD_HEADS > 1 else token
    rho_x = tl.load(field_ptr + 2 * at, mask=n < count, other=0.0).to(tl.float32)
    rho_y = tl.load(field_ptr + 2 * at + 1, mask=n < count, other=0.0).to(tl.float32)
    x, y = (token % W).to(tl.int32), ((token // W) % H).to(tl.int32)
    left, u, free_x = _begin(x.to(tl.float32) + rho_x, W, last_x, RADIUS)
    top, v, free_y = _begin(y.to(tl.float32) + rho_y, H, last_y, RADIUS)
    first = n + ((top - y) * W + left - x).to(tl.int64) * HEADS
    return first, u, v, free_x, free_y


@triton.jit
def _places(ptr, row, mask, c, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Where some channels from c on of rows of a table are, (BLOCK, CHUNK), and which of them exist."""
    d = c + tl.arange(0, CHUNK)
    return ptr + (row * WIDTH)[:, None] + d[None, :], mask[:, None] & (d < WIDTH)[None, :]


@triton.jit
def _part(ptr, row, mask, c, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Some channels from c on of rows of a table, (BLOCK, CHUNK) in float32, zeros outside."""
    at, inside = _places(ptr, row, mask, c, WIDTH, CHUNK)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_key(at, inside, m: tl.constexpr, W, SIDE: tl.constexpr, STEP: tl.constexpr):
    """Those of key m. A window's row has one address, and its keys lie known numbers of bytes from it."""
    return tl.load(at + (m // SIDE) * (W * STEP) + (m % SIDE) * STEP, mask=inside, other=0.0).to(tl.float32)


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
    """Add to each key's tensor the product of a with b's row there, or their negative L1 distance."""
    for c in range(0, channels, CHUNK):
        a = _part(a_ptr, n, mask, c, WIDTH, CHUNK)
        at, inside = _places(b_ptr, first, mask, c, WIDTH, CHUNK)
        sums = ()
        for m in tl.static_range(SIDE * SIDE):
            b = _of_key(at, inside, m, W, SIDE, HEADS * WIDTH)
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
    """The scores of a window's keys, a tensor each."""
    sums = _zeros(BLOCK, SIDE * SIDE)
    sums = _add_products(sums, q_ptr, k_ptr, n, first, mask, W, channels, HEADS, SIDE, D, CHUNK, L1)
    scores = ()
    for m in tl.static_range(SIDE * SIDE):
        scores = scores + (sums[m] * scale,)
    return scores


@triton.jit
def _entry(values, t: tl.constexpr, i: tl.constexpr, SIDE: tl.constexpr):
    """Entry i of sub-window t (nw, ne, sw, se)."""
    return values[(i // (SIDE - 1) + t // 2) * SIDE + i % (SIDE - 1) + t % 2]


@triton.jit
def _sub_windows(scores, SIDE: tl.constexpr):
    """Of each sub-window the largest score, and one over its sum of exponentials."""
    tops, shares = (), ()
    for t in tl.static_range(4):
        top = _entry(scores, t, 0, SIDE)
        for i in tl.static_range(1, (SIDE - 1) * (SIDE - 1)):
            top = tl.maximum(top, _entry(scores, t, i, SIDE))
        total = tl.zeros_like(top)
        for i in tl.static_range((SIDE - 1) * (SIDE - 1)):
            total += tl.exp(_entry(scores, t, i, SIDE) - top)
        tops = tops + (top,)
        shares = shares + (1 / total,)
    return tops, shares


@triton.jit
def _weights(u, v):
    return (1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v


@triton.jit
def _attention(m: tl.constexpr, scores, tops, shares, weights, SIDE: tl.constexpr):
    """What key m of the window gets."""
    total = tl.zeros_like(tops[0])
    for t in tl.static_range(4):
        dy = m // SIDE - t // 2
        dx = m % SIDE - t % 2
        if (dy >= 0) & (dy < SIDE - 1) & (dx >= 0) & (dx < SIDE - 1):
            total += weights[t] * shares[t] * tl.exp(scores[m] - tops[t])
    return total


@triton.jit
def _joined(values, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Every STEP-th of the tensors from FIRST on, COUNT of them, as one: (BLOCK, 2, ..., 2), lowest bit last."""
    if COUNT == 1:
        tile = values[FIRST]
    else:
        even = _joined(values, FIRST, 2 * STEP, COUNT // 2)
        tile = tl.join(even, _joined(values, FIRST + STEP, 2 * STEP, COUNT // 2))
    return tile


@triton.jit
def _columns(tile, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """The columns of a tile (BLOCK, COUNT), a tensor each."""
    if COUNT == 1:
        columns = (tl.reshape(tile, [BLOCK]),)
    else:
        # The right half apart from the left one first: then a tile changes threads once, not each of its parts.
        left, right = tl.split(tl.permute(tl.reshape(tile, [BLOCK, 2, COUNT // 2]), (0, 2, 1)))
        columns = _columns(left, BLOCK, COUNT // 2) + _columns(right, BLOCK, COUNT // 2)
    return columns


# What each query has of its keys lies in rows. A thread has a row: alone it would touch 2 bytes at a time, far from its
# neighbours'. Tiles go through shared memory, between threads that have rows and 16 bytes side by side. 36 = 32 + 4.


@triton.jit
def _store_rows(ptr, values, n, mask, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tensor for each key as rows of a table (queries, keys)."""
    MOST: tl.constexpr = SIDE * SIDE // 16 * 16
    REST: tl.constexpr = SIDE * SIDE - MOST
    at = (ptr + n * (SIDE * SIDE))[:, None]
    tile = tl.reshape(_joined(values, 0, 1, MOST), [BLOCK, MOST])
    tl.store(at + tl.arange(0, MOST)[None, :], tile, mask=mask[:, None])
    if REST > 0:
        tile = tl.reshape(_joined(values, MOST, 1, REST), [BLOCK, REST])
        tl.store(at + MOST + tl.arange(0, REST)[None, :], tile, mask=mask[:, None])


@triton.jit
def _load_rows(ptr, n, mask, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The same way back, in float32."""
    MOST: tl.constexpr = SIDE * SIDE // 16 * 16
    REST: tl.constexpr = SIDE * SIDE - MOST
    at = (ptr + n * (SIDE * SIDE))[:, None]
    tile = tl.load(at + tl.arange(0, MOST)[None, :], mask=mask[:, None], other=0.0)
    values = _columns(tile.to(tl.float32), BLOCK, MOST)
    if REST > 0:
        tile = tl.load(at + MOST + tl.arange(0, REST)[None, :], mask=mask[:, None], other=0.0)
        values = values + _columns(tile.to(tl.float32), BLOCK, REST)
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
    tops, shares = _sub_windows(scores, SIDE)
    weights = _weights(u, v)
    attention = ()
    for m in tl.static_range(SIDE * SIDE):
        attention = attention + (_attention(m, scores, tops, shares, weights, SIDE),)
    _store_rows(attention_ptr, attention, n, mask, SIDE, BLOCK)
    for c in range(0, value_channels, CHUNK):
        at, inside = _places(v_ptr, first, mask, c, DV, CHUNK)
        out = tl.zeros([BLOCK, CHUNK], tl.float32)
        for m in tl.static_range(SIDE * SIDE):
            out += attention[m][:, None] * _of_key(at, inside, m, W, SIDE, HEADS * DV)
        at, inside = _places(out_ptr, n, mask, c, DV, CHUNK)
        tl.store(at, out, mask=inside)


@triton.jit
def match_attention_bwd_q_kernel(
    grad_ptr,
    grad_attention_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    field_ptr,
    first_ptr,
    attention_ptr,
    slope_ptr,
    by_q_ptr,
    by_field_ptr,
    count,
    H,
    W,
    last_y,
    last_x,
    channels,
    value_channels,
    scale,
    OF_OUT: tl.constexpr,
    OF_ATTENTION: tl.constexpr,
    HEADS: tl.constexpr,
    FIELD_HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by q and each head's field; rows of first keys, the attention, and slopes: by scores, over sqrt(D).

    The last two are for the other backward kernel: (keys, queries), so that neighbouring threads' lie side by side.
    """
    SIDE: tl.constexpr = 2 * RADIUS + 2
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    first, u, v, free_x, free_y = _window(field_ptr, n, count, H, W, last_y, last_x, HEADS, FIELD_HEADS, RADIUS)
    scores = _scores(q_ptr, k_ptr, n, first, mask, W, channels, scale, HEADS, SIDE, D, CHUNK, L1, BLOCK)
    by_attention = _zeros(BLOCK, SIDE * SIDE)
    if OF_OUT:
        by_attention = _add_products(
            by_attention, grad_ptr, v_ptr, n, first, mask, W, value_channels, HEADS, SIDE, DV, CHUNK, False
        )
    if OF_ATTENTION:
        more, sums = _load_rows(grad_attention_ptr, n, mask, SIDE, BLOCK), ()
        for m in tl.static_range(SIDE * SIDE):
            sums = sums + (by_attention[m] + more[m],)
        by_attention = sums
    # After the products: the exponentials of all sub-windows, which stay in registers, would not fit beside those.
    tops, shares = _sub_windows(scores, SIDE)
    weights = _weights(u, v)
    by_weights = ()
    for t in tl.static_range(4):
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range((SIDE - 1) * (SIDE - 1)):
            total += tl.exp(_entry(scores, t, i, SIDE) - tops[t]) * _entry(by_attention, t, i, SIDE)
        by_weights = by_weights + (total * shares[t],)
    slopes = ()
    for m in tl.static_range(SIDE * SIDE):
        slope = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(4):
            dy = m // SIDE - t // 2
            dx = m % SIDE - t % 2
            if (dy >= 0) & (dy < SIDE - 1) & (dx >= 0) & (dx < SIDE - 1):
                alpha = shares[t] * tl.exp(scores[m] - tops[t])
                slope += weights[t] * alpha * (by_attention[m] - by_weights[t])
        slope *= scale
        tl.store(slope_ptr + m * count.to(tl.int64) + n, slope, mask=mask)
        a = _attention(m, scores, tops, shares, weights, SIDE)
        tl.store(attention_ptr + m * count.to(tl.int64) + n, a, mask=mask)
        slopes = slopes + (slope,)

    by_u = (1 - v) * (by_weights[1] - by_weights[0]) + v * (by_weights[3] - by_weights[2])
    by_v = (1 - u) * (by_weights[2] - by_weights[0]) + u * (by_weights[3] - by_weights[1])
    tl.store(by_field_ptr + 2 * n, tl.where(free_x, by_u, 0.0), mask=mask)
    tl.store(by_field_ptr + 2 * n + 1, tl.where(free_y, by_v, 0.0), mask=mask)
    tl.store(first_ptr + n, first, mask=mask)
    for c in range(0, channels, CHUNK):
        q, by_q = _part(q_ptr, n, mask, c, D, CHUNK), tl.zeros([BLOCK, CHUNK], tl.float32)
        at, inside = _places(k_ptr, first, mask, c, D, CHUNK)
        for m in tl.static_range(SIDE * SIDE):
            k = _of_key(at, inside, m, W, SIDE, HEADS * D)
            if L1:
                by_q -= slopes[m][:, None] * _sign(q - k)
            else:
                by_q += slopes[m][:, None] * k
        at, inside = _places(by_q_ptr, n, mask, c, D, CHUNK)
        tl.store(at, by_q, mask=inside)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def match_attention_bwd_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    order_ptr,
    starts_ptr,
    attention_ptr,
    slope_ptr,
    by_k_ptr,
    by_v_ptr,
    count,
    H,
    W,
    OF_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    RADIUS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by some channels of k and v: sums over the queries of each list, in its order."""
    SIDE: tl.constexpr = 2 * RADIUS + 2
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * CHUNK
    mask = n < count
    x, y = (n // HEADS) % W, (n // HEADS // W) % H
    k = _part(k_ptr, n, mask, c, D, CHUNK)
    by_k = tl.zeros([BLOCK, CHUNK], tl.float32)
    by_v = tl.zeros([BLOCK, CHUNK], tl.float32)
    for m in range(SIDE * SIDE):
        dy, dx = m // SIDE, m % SIDE
        listed = mask & (y >= dy) & (x >= dx)
        cell = n - (dy * W + dx) * HEADS
        at = tl.load(starts_ptr + cell, mask=listed, other=0)
        end = tl.load(starts_ptr + cell + 1, mask=listed, other=0)
        for _ in range(tl.max(end - at, 0)):
            here = at < end
            query = tl.load(order_ptr + at, mask=here, other=0)
            slope = tl.load(slope_ptr + m * count.to(tl.int64) + query, mask=here, other=0.0)
            q = _part(q_ptr, query, here, c, D, CHUNK)
            by_k += slope[:, None] * (_sign(q - k) if L1 else q)
            if OF_OUT:
                a = tl.load(attention_ptr + m * count.to(tl.int64) + query, mask=here, other=0.0)
                by_v += a[:, None] * _part(grad_ptr, query, here, c, DV, CHUNK)
            at += 1
    at, inside = _places(by_k_ptr, n, mask, c, D, CHUNK)
    tl.store(at, by_k, mask=inside)
    at, inside = _places(by_v_ptr, n, mask, c, DV, CHUNK)
    tl.store(at, by_v, mask=inside)
