"""The plain form of `visionattn.kernels.match_attention` for CPUs.

The keys of all windows together are M times as large as k: queries of single heads, of any image, are processed in
chunks, each from the gathered keys to the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

__all__ = [
    "MARGIN",
    "backward",
    "bilinear_weights",
    "computed_in",
    "empty_outputs",
    "forward",
    "key_offsets",
    "windows",
]

MARGIN = 1e-3  # keeps floor(c) + r + 1 inside the map


def sub_windows(radius: int) -> list[list[int]]:
    """Indices of each sub-window in the extended window: nw, ne, sw, se."""
    side = 2 * radius + 2
    return [
        [y * side + x for y in range(down, down + side - 1) for x in range(right, right + side - 1)]
        for down, right in product((0, 1), repeat=2)
    ]


def bilinear_weights(u: Tensor, v: Tensor) -> list[Tensor]:
    left, up = 1 - u, 1 - v
    return [left * up, u * up, left * v, u * v]


def windows(field: Tensor, heads: int, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the windows.

    Returns:
        The row of each window's first key in a table (B H W heads, ...) as (B, H, W, heads), and the fractions u and v
        as (B, H, W, heads or 1).
    """
    B, H, W = field.shape[:3]
    x, y = positions(field)
    left, u = floor_position(x, radius, W)
    top, v = floor_position(y, radius, H)
    image = torch.arange(B, device=field.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=field.device)
    return ((image * H + top) * W + left) * heads + head, u, v


def positions(field: Tensor) -> tuple[Tensor, Tensor]:
    """Centres before clamping: x and y of p + rho."""
    H, W = field.shape[1:3]
    x = torch.arange(W, dtype=field.dtype, device=field.device).view(-1, 1)
    y = torch.arange(H, dtype=field.dtype, device=field.device).view(-1, 1, 1)
    return x + field[..., 0], y + field[..., 1]


def floor_position(position: Tensor, radius: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of the window along an axis, and the distance of the centre from its integer neighbour."""
    # Not Tensor.clamp, whose gradient at a bound depends on the version of PyTorch: here it is that of the interior.
    last = size - 1 - radius - MARGIN
    centre = position.masked_fill(position < radius, radius).masked_fill(position > last, last)
    whole = centre.floor().long().clamp(radius, size - 2 - radius)  # again, for NaN
    return whole - radius, centre - whole


def key_offsets(like: Tensor, radius: int) -> Tensor:
    """Rows of the window's keys in the table, relative to the first one, (M,)."""
    W, heads = like.shape[2:4]
    step = torch.arange(2 * radius + 2, device=like.device)
    return ((step.unsqueeze(1) * W + step) * heads).flatten()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Elements of the gathered keys of a chunk, for at least one query. On CPUs 2 MiB of float32 is about the size of a
# core's second-level cache; on other devices, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**19, 2**26


class Matched:
    """One call's arguments as tables of single heads, and the passes over chunks of G queries."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str) -> None:
        self.dtype = computed_in(q.dtype)
        self.arguments = (q, k, v, field)
        self.q, self.k, self.v = q.reshape(-1, q.shape[4]), k.reshape(-1, k.shape[4]), v.reshape(-1, v.shape[4])
        first, *fractions = windows(field.to(self.dtype), q.shape[3], radius)
        self.first = first.flatten()
        self.right, self.down = (fraction.expand_as(first).reshape(-1) for fraction in fractions)
        self.offsets = key_offsets(q, radius)
        self.sub_windows = torch.tensor(sub_windows(radius), device=q.device).flatten()
        self.radius, self.by_distance, self.scale = radius, similarity == "l1", q.shape[4] ** -0.5
        self.memory: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[slice]:
        wanted = _CHUNK_ON_CPU if self.q.device.type == "cpu" else _CHUNK_ELSEWHERE
        queries = max(1, wanted // (len(self.offsets) * max(1, self.q.shape[1], self.v.shape[1])))
        for start in range(0, len(self.q), queries):
            yield slice(start, start + queries)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory reused by all chunks: allocating it again costs more than the computation in it."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.q.new_empty(size, dtype=self.dtype)
        return self.memory[name][:size].view(shape)

    def gather(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        """Keys or values of a chunk, (G, M, channels)."""
        found = self.scratch(name, len(rows), table.shape[1])
        if table.dtype == self.dtype:
            torch.index_select(table, 0, rows, out=found)
        else:
            found.copy_(table.index_select(0, rows))
        return found.view(-1, len(self.offsets), table.shape[1])

    def attend(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A chunk's attention.

        Returns:
            rows (G M) of the tables, q (G, D), keys (G, M, D), alpha (4, (2r + 1)^2, G), w (4, 1, G) and the attention
            (G, M). Queries are the last axis, so that a softmax over few keys is vectorised.
        """
        rows = (self.first[chunk, None] + self.offsets).flatten()
        q, keys = self.q[chunk].to(self.dtype), self.gather("k", self.k, rows)
        if self.by_distance:
            scores = torch.cdist(q.unsqueeze(1), keys, p=1.0).squeeze(1).mul_(-self.scale)
        else:
            scores = torch.bmm(keys, q.unsqueeze(2)).squeeze(2).mul_(self.scale)
        alpha = self.split(scores).softmax(1)
        w = torch.stack(bilinear_weights(self.right[chunk], self.down[chunk])).unsqueeze(1)
        return rows, q, keys, alpha, w, self.join(w * alpha)

    def split(self, x: Tensor) -> Tensor:
        """Entries of the sub-windows, (G, M) -> (4, (2r + 1)^2, G)."""
        return x.t().contiguous().index_select(0, self.sub_windows).view(4, -1, len(x))

    def join(self, x: Tensor) -> Tensor:
        """Sum the values for each entry of the extended window, (4, (2r + 1)^2, G) -> (G, M)."""
        total = x.new_zeros(len(self.offsets), x.shape[2])
        return _add_rows(total, self.sub_windows, x.flatten(0, 1)).t().contiguous()

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output and the attention."""
        q, _, v, _ = self.arguments
        out, attention = empty_outputs(q, v, self.radius)
        flat_out, flat_attention = out.view(-1, v.shape[4]), attention.view(-1, attention.shape[4])
        for chunk in self.chunks():
            rows, *_, a = self.attend(chunk)
            flat_attention[chunk] = a
            # Matrix products of this size are slower.
            flat_out[chunk] = self.gather("v", self.v, rows).mul_(a.unsqueeze(2)).sum(1)
        return out, attention

    def backward(self, grad: Tensor | None, grad_attention: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the field."""
        grad_q = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=self.dtype) for x in (self.k, self.v))
        grad_field = self.right.new_empty(*self.right.shape, 2)
        ones = self.v.new_ones(self.v.shape[1], dtype=self.dtype)  # a sum over few channels takes longer than mv
        g_out = None if grad is None else grad.reshape(-1, grad.shape[4])
        g_attention = None if grad_attention is None else grad_attention.reshape(-1, len(self.offsets))
        for chunk in self.chunks():
            rows, q, keys, alpha, w, a = self.attend(chunk)
            slope = torch.zeros_like(a)  # of the attention, (G, M)
            if g_attention is not None:
                slope = slope + g_attention[chunk].to(self.dtype)
            if g_out is not None:
                g = g_out[chunk].to(self.dtype)
                values = self.gather("v", self.v, rows)
                slope = slope + torch.mv(values.mul_(g.unsqueeze(1)).flatten(0, 1), ones).view_as(slope)
                _add_rows(grad_v, rows, torch.mul(a.unsqueeze(2), g.unsqueeze(1), out=values).flatten(0, 1))
            by_window = self.split(slope)
            by_weight = (alpha * by_window).sum(1)  # (4, G)
            by_score = self.join(by_window.sub_(by_weight.unsqueeze(1)).mul_(alpha).mul_(w)).mul_(self.scale)
            if self.by_distance:
                per_key = torch.sub(q.unsqueeze(1), keys, out=keys).sign_().mul_(by_score.unsqueeze(2))
                grad_q[chunk] = per_key.sum(1).neg_()
            else:
                grad_q[chunk] = torch.bmm(by_score.unsqueeze(1), keys).squeeze(1)
                per_key = torch.mul(by_score.unsqueeze(2), q.unsqueeze(1), out=keys)
            _add_rows(grad_k, rows, per_key.flatten(0, 1))
            nw, ne, sw, se = by_weight
            grad_field[chunk, 0] = (ne - nw).lerp_(se - sw, self.down[chunk])
            grad_field[chunk, 1] = (sw - nw).lerp_(se - ne, self.right[chunk])
        q, k, v, field = self.arguments
        return (
            grad_q.view(q.shape),
            grad_k.view(k.shape).to(k.dtype),
            grad_v.view(v.shape).to(v.dtype),
            self.free(grad_field.view(*q.shape[:4], 2)).to(field.dtype),
        )

    def free(self, grad_field: Tensor) -> Tensor:
        """The field's gradient where its centre was not clamped, summed over heads that share it."""
        q, *_, field = self.arguments
        free = [
            (position >= self.radius) & (position <= size - 1 - self.radius - MARGIN)
            for position, size in zip(positions(field.to(self.dtype)), (q.shape[2], q.shape[1]))
        ]
        if field.shape[3] != q.shape[3]:
            grad_field = grad_field.sum(3, keepdim=True)
        return grad_field.masked_fill(~torch.stack(free, -1), 0)


def _add_rows(table: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Add rows of an update to those of a table, in a deterministic order."""
    if table.device.type == "cpu":
        return table.index_add_(0, rows, update)
    return table.index_put_((rows,), update, accumulate=True)


def empty_outputs(q: Tensor, v: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(v.shape), q.new_empty(*q.shape[:4], (2 * radius + 2) ** 2)


def forward(*args) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, heads, Dv) and the attention (B, H, W, heads, M)."""
    return Matched(*args).forward()


def backward(grad: Tensor | None, grad_attention: Tensor | None, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the field."""
    return Matched(*args).backward(grad, grad_attention)
