r"""Match attention: every pixel attends to a small window around a real-valued position of its own.

Query i at pixel p_i = (x, y) has a field rho_i, in pixels: the window's centre relative to p_i. Positions are (x, y).

    c_i = clamp(p_i + rho_i)     x to [r, W - 1 - r - 1e-3], y to [r, H - 1 - r - 1e-3]
    n_i = floor(c_i)             (u, v) = c_i - n_i

The extended window of n + 2 pixels a side, n = 2r, holds the keys at n_i + (dx, dy), dx and dy in -r .. r + 1, numbered
row by row, m = (dy + r) (2r + 2) + (dx + r), M = (2r + 2)^2 of them. With scores

    s_im = -|q_i - k_m|_1 / sqrt(D)      similarity "l1"
    s_im = q_i . k_m / sqrt(D)           similarity "dot"

bilinear softmax interpolates the softmaxes over the four (2r + 1)^2 sub-windows S_t whose centres are n_i + (0, 0),
(1, 0), (0, 1), (1, 1), and so is continuous in rho:

    alpha_t = softmax of s_i over S_t, 0 elsewhere      w_t = (1 - u)(1 - v), u (1 - v), (1 - u) v, u v
    A_im    = sum over t of w_t alpha_tm                sum over m of A_im = 1
    o_i     = sum over m of A_im v_m

    q, k       (B, H, W, heads, D)
    v          (B, H, W, heads, Dv)
    field      (B, H, W, heads, 2)  rho, or (B, H, W, 1, 2) for a field that all heads share
    out        (B, H, W, heads, Dv)
    attention  (B, H, W, heads, M)  A

Windows near the border lie inside the map, shifted. With cotangents g of o and h of A, the gradients are

    G_m   = h_m + g . v_m                     of A
    dw_t  = sum over m of alpha_tm G_m        of w; rho_x gets (1 - v)(dw_ne - dw_nw) + v (dw_se - dw_sw), rho_y
                                              (1 - u)(dw_sw - dw_nw) + u (dw_se - dw_ne), each 0 where c was outside
    ds_m  = sum over t of w_t alpha_tm (G_m - dw_t)
    grad_q = -sum over m of ds_m sign(q - k_m) / sqrt(D), grad_k_m the terms of that sum, grad_v_m = A_m g

with sign(0) = 0; floor is constant almost everywhere, and jumps leave gradients of rho one-sided at integers.

Dtypes: float64, float32, bfloat16, float16, q, k and v of one (autocast casts them together). The field is of any:
positions, floor and weights are computed in float32, or float64 for float64 q, and autocast leaves the field alone:
from pixel 512 to 1024 float16 has steps of 1/2 pixel and bfloat16 of 4. Half precisions are computed in float32.
Tolerance, forward and gradients, as a share of the float64 result's largest magnitude, or of 1 where that is less:
    float64 1e-13, float32 1e-5, bfloat16 2e-2, float16 2e-3.
Form: chunks of queries whose gathered keys stay in a CPU's cache. Only the arguments are kept for the backward pass,
which computes the attention again. Each softmax has the maximum of its own sub-window: with one for all four, a key far
above the others in one of them would leave the rest without weight.
Kernels: Triton on CUDA, forward to radius 3 and backward to radius 2, beyond which registers end; there, float64 and
other devices take the plain form.
Limits: H and W of 2r + 2 or more.
Second derivatives, forward mode and the transforms of `torch.func` take the definition, and its memory.
Source: MatchAttention, arXiv 2510.14260.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import check_alike, kernels_enabled, register, register_flop_formula

__all__ = ["SIMILARITIES", "bilinear_softmax", "match_attention_definition"]

SIMILARITIES = ("l1", "dot")
_MARGIN = 1e-3  # keeps floor(c) + r + 1 inside the map


def match_attention_definition(
    q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch. Keys are gathered as rows of a table of heads: the fastest form in ONNX."""
    dtype = _computed_in(q.dtype)
    first, right, down = _windows(field.to(dtype), q.shape[3], radius)
    rows = first.unsqueeze(-1) + _offsets(q, radius)  # (B, H, W, heads, M)
    keys = F.embedding(rows, k.reshape(-1, k.shape[4])).to(dtype)
    query = q.unsqueeze(-2).to(dtype)
    if similarity == "l1":
        # A row of the window against the query as many times: ONNX Runtime broadcasts runs of D numbers slowly.
        side = 2 * radius + 2
        away = keys.unflatten(-2, (side, side)).flatten(-2) - query.repeat(1, 1, 1, 1, 1, side)
        scores = -torch.linalg.vector_norm(away.view(keys.shape), 1, -1) * q.shape[4] ** -0.5
    else:
        scores = (query @ keys.transpose(-1, -2)).squeeze(-2) * q.shape[4] ** -0.5
    attention = _bilinear(scores, right, down)
    values = F.embedding(rows, v.reshape(-1, v.shape[4])).to(dtype)
    out = (attention.unsqueeze(-2) @ values).squeeze(-2)
    return out.to(q.dtype), attention.to(q.dtype)


def bilinear_softmax(scores: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate bilinearly between the softmaxes over the four sub-windows of an extended window.

    Args:
        scores: (..., M), M the square of an even number, row by row.
        fraction: (..., 2), (u, v) in [0, 1]: how far the centre is from the first sub-window's towards the last's.

    Returns:
        The attention (..., M), which sums to 1.
    """
    return _bilinear(scores, *fraction.unbind(-1))


def _bilinear(scores: Tensor, u: Tensor, v: Tensor) -> Tensor:
    along = torch.arange(round(scores.shape[-1] ** 0.5), device=scores.device)
    within = torch.stack([along < along.shape[0] - 1, along > 0])  # first and second sub-window along an axis
    within = (within[:, None, :, None] & within[:, None]).flatten(2).flatten(0, 1)  # (4, M): nw, ne, sw, se
    outside = torch.zeros(within.shape, dtype=scores.dtype, device=scores.device).masked_fill(~within, float("-inf"))
    alpha = (scores + outside.view(4, *[1] * (scores.ndim - 1), -1)).softmax(-1)
    return (torch.stack(_weights(u, v)).unsqueeze(-1) * alpha).sum(0)


def _sub_windows(radius: int) -> list[list[int]]:
    """Entries of the extended window that belong to each sub-window: nw, ne, sw, se."""
    side = 2 * radius + 2
    return [
        [y * side + x for y in range(down, down + side - 1) for x in range(right, right + side - 1)]
        for down, right in product((0, 1), repeat=2)
    ]


def _weights(u: Tensor, v: Tensor) -> list[Tensor]:
    left, up = 1 - u, 1 - v
    return [left * up, u * up, left * v, u * v]


def _windows(field: Tensor, heads: int, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where windows lie.

    Returns:
        The row of each window's first key in a table (B H W heads, ...) as (B, H, W, heads), and the fractions u and v
        as (B, H, W, heads or 1).
    """
    B, H, W = field.shape[:3]
    x, y = _positions(field)
    left, u = _floor(x, radius, W)
    top, v = _floor(y, radius, H)
    image = torch.arange(B, device=field.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=field.device)
    return ((image * H + top) * W + left) * heads + head, u, v


def _positions(field: Tensor) -> tuple[Tensor, Tensor]:
    """Centres before clamping: x and y of p + rho."""
    H, W = field.shape[1:3]
    x = torch.arange(W, dtype=field.dtype, device=field.device).view(-1, 1)
    y = torch.arange(H, dtype=field.dtype, device=field.device).view(-1, 1, 1)
    return x + field[..., 0], y + field[..., 1]


def _floor(position: Tensor, radius: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of the window along an axis, and how far the centre is from its integer neighbour."""
    # Not Tensor.clamp, whose gradient on a bound depends on the version of PyTorch: here it is that of the inside.
    last = size - 1 - radius - _MARGIN
    centre = position.masked_fill(position < radius, radius).masked_fill(position > last, last)
    whole = centre.floor().long().clamp(radius, size - 2 - radius)  # again, for NaN
    return whole - radius, centre - whole


def _offsets(like: Tensor, radius: int) -> Tensor:
    """Rows of the window's keys in the table, less the first one's, (M,)."""
    W, heads = like.shape[2:4]
    step = torch.arange(2 * radius + 2, device=like.device)
    return ((step.unsqueeze(1) * W + step) * heads).flatten()


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Plain form. The keys of all windows together are M times as large as k: chunks of queries of single heads, whatever
# image they are of, go from the gathered keys to the output one after the other.

# Numbers in the gathered keys of a chunk, of one query at least. On CPUs 2 MiB of float32 is about the size of a core's
# second-level cache; elsewhere, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**19, 2**26


class _Matched:
    """One call's arguments as tables of single heads, and the passes over chunks of G queries."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str) -> None:
        self.dtype = _computed_in(q.dtype)
        self.arguments = (q, k, v, field)
        self.q, self.k, self.v = q.reshape(-1, q.shape[4]), k.reshape(-1, k.shape[4]), v.reshape(-1, v.shape[4])
        first, *fractions = _windows(field.to(self.dtype), q.shape[3], radius)
        self.first = first.flatten()
        self.right, self.down = (fraction.expand_as(first).reshape(-1) for fraction in fractions)
        self.offsets = _offsets(q, radius)
        self.sub_windows = torch.tensor(_sub_windows(radius), device=q.device).flatten()
        self.radius, self.by_distance, self.scale = radius, similarity == "l1", q.shape[4] ** -0.5
        self.memory: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[slice]:
        wanted = _CHUNK_ON_CPU if self.q.device.type == "cpu" else _CHUNK_ELSEWHERE
        queries = max(1, wanted // (len(self.offsets) * max(1, self.q.shape[1], self.v.shape[1])))
        for start in range(0, len(self.q), queries):
            yield slice(start, start + queries)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that every chunk uses again: asking for it anew costs more than what is done with it."""
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
            (G, M). That queries are the last axis is what lets a softmax over few keys be vectorised.
        """
        rows = (self.first[chunk, None] + self.offsets).flatten()
        q, keys = self.q[chunk].to(self.dtype), self.gather("k", self.k, rows)
        if self.by_distance:
            scores = torch.cdist(q.unsqueeze(1), keys, p=1.0).squeeze(1).mul_(-self.scale)
        else:
            scores = torch.bmm(keys, q.unsqueeze(2)).squeeze(2).mul_(self.scale)
        alpha = self.split(scores).softmax(1)
        w = torch.stack(_weights(self.right[chunk], self.down[chunk])).unsqueeze(1)
        return rows, q, keys, alpha, w, self.join(w * alpha)

    def split(self, x: Tensor) -> Tensor:
        """Entries of the sub-windows, (G, M) -> (4, (2r + 1)^2, G)."""
        return x.t().contiguous().index_select(0, self.sub_windows).view(4, -1, len(x))

    def join(self, x: Tensor) -> Tensor:
        """Sum what belongs to one entry of the extended window, (4, (2r + 1)^2, G) -> (G, M)."""
        total = x.new_zeros(len(self.offsets), x.shape[2])
        return _add_rows(total, self.sub_windows, x.flatten(0, 1)).t().contiguous()

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output and the attention."""
        q, _, v, _ = self.arguments
        out, attention = _outputs(q, v, self.radius)
        flat_out, flat_attention = out.view(-1, v.shape[4]), attention.view(-1, attention.shape[4])
        for chunk in self.chunks():
            rows, *_, a = self.attend(chunk)
            flat_attention[chunk] = a
            # Products of so small matrices are slower.
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
            (position >= self.radius) & (position <= size - 1 - self.radius - _MARGIN)
            for position, size in zip(_positions(field.to(self.dtype)), (q.shape[2], q.shape[1]))
        ]
        if field.shape[3] != q.shape[3]:
            grad_field = grad_field.sum(3, keepdim=True)
        return grad_field.masked_fill(~torch.stack(free, -1), 0)


def _add_rows(table: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Add rows of an update to those of a table, in an order that is the same in every call."""
    if table.device.type == "cpu":
        return table.index_add_(0, rows, update)
    return table.index_put_((rows,), update, accumulate=True)


def _outputs(q: Tensor, v: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(v.shape), q.new_empty(*q.shape[:4], (2 * radius + 2) ** 2)


def _check(q, k, v, field, radius, similarity, **others: Tensor) -> None:
    check_alike("match_attention", q=q, k=k, v=v, **others)
    if not field.is_floating_point() or field.device != q.device:
        raise InputError(
            f"match_attention takes a field of floating-point numbers on {q.device}, where q is, but got "
            f"{field.dtype} on {field.device}."
        )
    given = ", ".join(f"{n}: {tuple(x.shape)}" for n, x in {"q": q, "k": k, "v": v, "field": field}.items())
    if any(x.ndim != 5 for x in (q, k, v, field)) or k.shape != q.shape or v.shape[:4] != q.shape[:4]:
        raise InputError(
            f"match_attention takes q and k (B, H, W, heads, D), v (B, H, W, heads, Dv) and a field "
            f"(B, H, W, heads or 1, 2), but got {given}."
        )
    if field.shape[:3] != q.shape[:3] or field.shape[3] not in (1, q.shape[3]) or field.shape[4] != 2:
        raise InputError(f"match_attention takes a field (B, H, W, heads or 1, 2) for q's B, H, W, but got {given}.")
    if similarity not in SIMILARITIES:
        raise InputError(f"match_attention's similarity is one of {', '.join(SIMILARITIES)}, but got {similarity!r}.")
    side = 2 * radius + 2
    if radius < 1 or q.shape[1] < side or q.shape[2] < side:
        raise InputError(
            f"match_attention takes a radius of 1 or more and maps that hold its window of {side} x {side} pixels, "
            f"but got radius {radius} and {given}."
        )


def _use_triton(q: Tensor, v: Tensor) -> bool:
    return q.dtype != torch.float64 and min(q.numel(), v.numel()) > 0 and kernels_enabled(q.device)


@torch.library.custom_op("visionattn::match_attention", mutates_args=())
def match_attention(
    q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    return _Matched(q, k, v, field, radius, similarity).forward()


@match_attention.register_kernel("cuda")
def _(q, k, v, field, radius, similarity) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    if radius > 3 or not _use_triton(q, v):
        return _Matched(q, k, v, field, radius, similarity).forward()
    from visionattn.kernels._triton import match_attention as triton_kernels

    return triton_kernels.forward(q, k, v, field, radius, similarity)


@match_attention.register_fake
def _(q, k, v, field, radius, similarity) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    return _outputs(q, v, radius)


def _check_backward(grad, grad_attention, q, k, v, field, radius, similarity) -> None:
    given = {"grad": grad, "grad_attention": grad_attention}
    _check(q, k, v, field, radius, similarity, **{name: x for name, x in given.items() if x is not None})


@torch.library.custom_op("visionattn::match_attention_backward", mutates_args=())
def match_attention_backward(
    grad: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: Tensor,
    radius: int,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, grad_attention, q, k, v, field, radius, similarity)
    return _Matched(q, k, v, field, radius, similarity).backward(grad, grad_attention)


@match_attention_backward.register_kernel("cuda")
def _(grad, grad_attention, q, k, v, field, radius, similarity):
    _check_backward(grad, grad_attention, q, k, v, field, radius, similarity)
    if radius > 2 or not _use_triton(q, v):
        return _Matched(q, k, v, field, radius, similarity).backward(grad, grad_attention)
    from visionattn.kernels._triton import match_attention as triton_kernels

    return triton_kernels.backward(grad, grad_attention, q, k, v, field, radius, similarity)


@match_attention_backward.register_fake
def _(grad, grad_attention, q, k, v, field, radius, similarity):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, field))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)  # the attention often has none


def _differentiate(ctx, grad: Tensor | None, grad_attention: Tensor | None):
    return *torch.ops.visionattn.match_attention_backward(grad, grad_attention, *ctx.saved_tensors, *ctx.settings), *[
        None
    ] * len(ctx.settings)


register(
    "match_attention",
    definition=match_attention_definition,
    check=_check,
    save=_save,
    differentiate=_differentiate,
    kept=(3,),  # the field
)


def _products(q, v, radius: int, similarity: str) -> int:
    """Multiplications of the forward pass with keys, where they are multiplied, and values."""
    B, H, W, heads, D = q
    return B * H * W * heads * (2 * radius + 2) ** 2 * (v[4] + (D if similarity == "dot" else 0))


@register_flop_formula(torch.ops.visionattn.match_attention)
def _(q, k, v, field, radius, similarity, out_shape=None) -> int:
    """Products alone: distances and softmaxes do not count, as nowhere."""
    return 2 * _products(q, v, radius, similarity)


@register_flop_formula(torch.ops.visionattn.match_attention_backward)
def _(grad, grad_attention, q, k, v, field, radius, similarity, out_shape=None) -> int:
    """Two products for each of the forward pass, as autograd over the definition; those computed again do not count."""
    return 4 * _products(q, v, radius, similarity)
