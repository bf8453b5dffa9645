r"""Match attention: every pixel attends to a small window around its own real-valued position.

Query i at pixel p_i = (x, y) has a field rho_i, in pixels: the window's centre relative to p_i. Positions are (x, y).

    c_i = clamp(p_i + rho_i)     x to [r, W - 1 - r - 1e-3], y to [r, H - 1 - r - 1e-3]
    n_i = floor(c_i)             (u, v) = c_i - n_i

The extended window of n + 2 pixels per side, n = 2r, has the keys n_i + (dx, dy), dx and dy in -r .. r + 1, numbered
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
    field      (B, H, W, heads, 2)  rho, or (B, H, W, 1, 2) for a field shared by all heads
    out        (B, H, W, heads, Dv)
    attention  (B, H, W, heads, M)  A

Windows near the border are shifted to lie inside the map. With cotangents g of o and h of A, the gradients are

    G_m   = h_m + g . v_m                     of A
    dw_t  = sum over m of alpha_tm G_m        of w; rho_x gets (1 - v)(dw_ne - dw_nw) + v (dw_se - dw_sw), rho_y
                                              (1 - u)(dw_sw - dw_nw) + u (dw_se - dw_ne), each 0 where c was clamped
    ds_m  = sum over t of w_t alpha_tm (G_m - dw_t)
    grad_q = -sum over m of ds_m sign(q - k_m) / sqrt(D), grad_k_m the terms of that sum, grad_v_m = A_m g

with sign(0) = 0; floor is constant almost everywhere, and jumps leave gradients of rho one-sided at integers.

Dtypes: float64, float32, bfloat16, float16, the same for q, k and v (autocast casts them together). The field can have
any: positions, floor and weights are computed in float32, or float64 for float64 q, and autocast does not cast it:
from pixel 512 to 1024 float16 has steps of 1/2 pixel and bfloat16 of 4. Half precision is computed in float32.
Tolerance, forward and gradients, relative to the float64 result's largest magnitude, or to 1 if that is less:
    float64 1e-13, float32 1e-5, bfloat16 2e-2, float16 2e-3.
Form: chunks of queries whose gathered keys stay in a CPU's cache. Only the arguments are kept for the backward pass,
which recomputes the attention. Each softmax subtracts the maximum of its own sub-window: with one for all four, a key
far above the others in one of them would leave the rest without weight.
Kernels: Triton on CUDA, forward to radius 3 and backward to radius 2 (larger radii exceed the registers); larger radii,
float64 and other devices use the plain form.
Limits: H and W at least 2r + 2.
Second derivatives, forward mode and the transforms of `torch.func` use the definition, with its memory cost.
Source: MatchAttention, arXiv 2510.14260.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import check_alike, kernels_enabled, register, register_flop_formula
from visionattn.kernels._plain import match_attention as plain
from visionattn.kernels._plain.match_attention import (
    bilinear_weights,
    computed_in,
    empty_outputs,
    key_offsets,
    windows,
)

__all__ = ["SIMILARITIES", "bilinear_softmax", "match_attention_definition", "match_attention_exported"]

SIMILARITIES = ("l1", "dot")

# About exp(-80): where all weights of a sub-window underflow, it has no weights of its own.
_LEAST_SHARE = 1e-35


def match_attention_definition(
    q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch."""
    return _attend(q, k, v, field, radius, similarity, _bilinear)


def match_attention_exported(
    q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """The definition as exported to ONNX: with one softmax for all sub-windows.

    If all scores of a sub-window are more than 80 below the highest of the extended window, they count as equal.
    """
    return _attend(q, k, v, field, radius, similarity, _bilinear_by_one_softmax)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: Tensor,
    radius: int,
    similarity: str,
    bilinear: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Attend by interpolated softmaxes. Windows are gathered row by row: the fastest form in ONNX."""
    # P pixels of all images are one axis: some runtimes support five axes at most.
    dtype, side, D = computed_in(q.dtype), 2 * radius + 2, q.shape[4]
    first, right, down = (x.flatten(0, 2) for x in windows(field.to(dtype), q.shape[3], radius))
    rows = first.unsqueeze(-1) + key_offsets(q, radius)[::side]  # (P, heads, side)
    keys = F.embedding(rows, _neighbours(k, side)).to(dtype)  # (P, heads, side, side D)
    query = q.flatten(0, 2).unsqueeze(-2).to(dtype)
    if similarity == "l1":
        # A row of the window minus the repeated query: ONNX Runtime broadcasts runs of D elements slowly.
        away = (keys - query.repeat(1, 1, 1, side)).reshape(*first.shape, side * side, D)
        # Not a norm, which becomes ReduceL1: MNN computes a different sum for it.
        scores = -away.abs().sum(-1) * D**-0.5
    else:
        scores = (query @ keys.reshape(*first.shape, side * side, D).transpose(-1, -2)).squeeze(-2) * D**-0.5
    attention = bilinear(scores, right, down)
    values = F.embedding(rows, _neighbours(v, side)).to(dtype).reshape(*first.shape, side * side, v.shape[4])
    out = (attention.unsqueeze(-2) @ values).squeeze(-2)
    return out.to(q.dtype).view(v.shape), attention.to(q.dtype).view(*q.shape[:4], side * side)


def _neighbours(x: Tensor, side: int) -> Tensor:
    """A table of the heads of all pixels, each with those of the next pixels to the right: (B H W heads, side D)."""
    count = x.shape[3]
    # Windows lie inside the map: entries that run over its right border are never read.
    heads = F.pad(x.reshape(-1, x.shape[4]), (0, 0, 0, (side - 1) * count))
    return torch.cat([heads[step * count : (step + 1 - side) * count or None] for step in range(side)], -1)


def bilinear_softmax(scores: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate bilinearly between the softmaxes over the four sub-windows of an extended window.

    Args:
        scores: (..., M), M the square of an even number, row by row.
        fraction: (..., 2), (u, v) in [0, 1]: position of the centre between the first and the last sub-window's.

    Returns:
        The attention (..., M), which sums to 1.
    """
    return _bilinear(scores, *fraction.unbind(-1))


def _within(scores: Tensor) -> Tensor:
    """Which keys of the extended window each sub-window contains, as 1 and 0: (4, M), nw, ne, sw, se."""
    along = torch.arange(round(scores.shape[-1] ** 0.5), device=scores.device)
    halves = torch.stack([along < along.shape[0] - 1, along > 0]).to(scores.dtype)
    return (halves[:, None, :, None] * halves[None, :, None, :]).flatten(2).flatten(0, 1)


def _bilinear(scores: Tensor, u: Tensor, v: Tensor) -> Tensor:
    within = _within(scores)
    outside = torch.zeros_like(within).masked_fill(within == 0, float("-inf"))
    alpha = (scores + outside.view(4, *[1] * (scores.ndim - 1), -1)).softmax(-1)
    return (torch.stack(bilinear_weights(u, v)).unsqueeze(-1) * alpha).sum(0)


def _bilinear_by_one_softmax(scores: Tensor, u: Tensor, v: Tensor) -> Tensor:
    within = _within(scores)
    shares = scores.softmax(-1).clamp(min=_LEAST_SHARE)
    weights = torch.stack(bilinear_weights(u, v), -1) / (shares @ within.T)  # (..., 4)
    return shares * (weights @ within)


def _check(q, k, v, field, radius, similarity, **others: Tensor) -> None:
    check_alike("match_attention", q=q, k=k, v=v, **others)
    if not field.is_floating_point() or field.device != q.device:
        raise InputError(
            f"match_attention takes a floating-point field on {q.device}, the device of q; got "
            f"{field.dtype} on {field.device}."
        )
    given = ", ".join(f"{n}: {tuple(x.shape)}" for n, x in {"q": q, "k": k, "v": v, "field": field}.items())
    if any(x.ndim != 5 for x in (q, k, v, field)) or k.shape != q.shape or v.shape[:4] != q.shape[:4]:
        raise InputError(
            f"match_attention takes q and k (B, H, W, heads, D), v (B, H, W, heads, Dv) and a field "
            f"(B, H, W, heads or 1, 2); got {given}."
        )
    if field.shape[:3] != q.shape[:3] or field.shape[3] not in (1, q.shape[3]) or field.shape[4] != 2:
        raise InputError(f"match_attention takes a field (B, H, W, heads or 1, 2) for q's B, H, W; got {given}.")
    if similarity not in SIMILARITIES:
        known = ", ".join(map(repr, SIMILARITIES))
        raise InputError(f"match_attention's similarity must be one of {known}; got {similarity!r}.")
    side = 2 * radius + 2
    if radius < 1 or q.shape[1] < side or q.shape[2] < side:
        raise InputError(
            f"match_attention needs a radius of at least 1 and maps of at least its window, {side} x {side} pixels; "
            f"got radius {radius} and {given}."
        )


def _use_triton(q: Tensor, v: Tensor) -> bool:
    return q.dtype != torch.float64 and min(q.numel(), v.numel()) > 0 and kernels_enabled(q.device)


@torch.library.custom_op("visionattn::match_attention", mutates_args=())
def match_attention(
    q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    return plain.forward(q, k, v, field, radius, similarity)


@match_attention.register_kernel("cuda")
def _(q, k, v, field, radius, similarity) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    if radius > 3 or not _use_triton(q, v):
        return plain.forward(q, k, v, field, radius, similarity)
    from visionattn.kernels._triton import match_attention as triton_kernels

    return triton_kernels.forward(q, k, v, field, radius, similarity)


@match_attention.register_fake
def _(q, k, v, field, radius, similarity) -> tuple[Tensor, Tensor]:
    _check(q, k, v, field, radius, similarity)
    return empty_outputs(q, v, radius)


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
    return plain.backward(grad, grad_attention, q, k, v, field, radius, similarity)


@match_attention_backward.register_kernel("cuda")
def _(grad, grad_attention, q, k, v, field, radius, similarity):
    _check_backward(grad, grad_attention, q, k, v, field, radius, similarity)
    if radius > 2 or not _use_triton(q, v):
        return plain.backward(grad, grad_attention, q, k, v, field, radius, similarity)
    from visionattn.kernels._triton import match_attention as triton_kernels

    return triton_kernels.backward(grad, grad_attention, q, k, v, field, radius, similarity)


@match_attention_backward.register_fake
def _(grad, grad_attention, q, k, v, field, radius, similarity):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, field))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)  # the attention often has no gradient


def _differentiate(ctx, grad: Tensor | None, grad_attention: Tensor | None):
    return *torch.ops.visionattn.match_attention_backward(grad, grad_attention, *ctx.saved_tensors, *ctx.settings), *[
        None
    ] * len(ctx.settings)


register(
    "match_attention",
    definition=match_attention_definition,
    exported=match_attention_exported,
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
    """Products only: distances and softmaxes are not counted, as usual."""
    return 2 * _products(q, v, radius, similarity)


@register_flop_formula(torch.ops.visionattn.match_attention_backward)
def _(grad, grad_attention, q, k, v, field, radius, similarity, out_shape=None) -> int:
    """Two products for each of the forward pass, as in autograd of the definition; recomputed ones do not count."""
    return 4 * _products(q, v, radius, similarity)
