"""Multi-query pooling: learned queries average the tokens of each image, which are both keys and values.

    a_bm = softmax over n of q_m . x_bn / sqrt(D)      over the tokens with mask True
    z_bm = sum over n of a_bmn x_bn

    x          (B, N, D)   tokens
    q          (M, D)      queries, shared by all images; several heads are stacked
    mask       (B, N)      bool, True for valid tokens; None for all
    scales     (B, N)      s, where x is int8: the tokens are then s_bn x_bn; None where x is not
    z          (B, M, D)
    attention  (B, M, N)   a; zeros, as z and all gradients, for an image without any token

With cotangents g of z and h of the attention, the gradients are

    d_bmn  = a_bmn (e_bmn - sum over n of a_bmn e_bmn) / sqrt(D)      e_bmn = g_bm . x_bn + h_bmn
    grad_q = sum over b, n of d_bmn x_bn                              (M, D)
    grad_x = sum over m of (a_bmn g_bm + d_bmn q_m)                   (B, N, D), computed only if x requires it

The attention is returned and kept for the backward pass: it has M / D of the tokens' size, and recomputing it
from its log-sum-exp would be a third product with the tokens besides the two that grad_q needs.

No float copy of all int8 tokens is made: the CPU form converts a chunk at a time, and the kernels multiply them
unscaled and apply the scales to per-token values: the logits, the attention that averages, and d before its product
with x. Such tokens and scales have no gradient.

Dtypes: float64, float32, bfloat16, float16, the same for x and q (autocast casts them together); half precision is
computed in float32, the backward pass from the rounded attention. With int8 x, z and the attention have q's dtype,
and scales have any floating dtype, which autocast does not cast.
Tolerance, forward and gradients, relative to the float64 result's largest magnitude, or to 1 if that is less:
    float64 1e-13, float32 1e-5, bfloat16 2e-2, float16 2e-3.
Form: chunks of images whose tokens stay in a CPU's cache between the two products that read them.
Kernels: Triton on CUDA; float64 there, empty tensors, and other devices use the plain form.
Limits: masked tokens, and their scales, must be finite.
Second derivatives, forward mode and the transforms of `torch.func` use the definition, with its memory cost.
Source: Efficient Probing, arXiv 2506.10178. There values are projected before they are averaged; averaged first, the
tokens serve as values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import (
    check_alike,
    kernels_enabled,
    register,
    register_flop_formula,
    widened,
)
from visionattn.kernels._plain import multi_query_pool as plain

__all__ = ["multi_query_pool_definition"]


def multi_query_pool_definition(
    x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch."""
    if scales is not None:
        x = x.to(q.dtype) * scales.to(q.dtype).unsqueeze(2)
    logits = (q * q.shape[1] ** -0.5) @ x.transpose(1, 2)
    if mask is None:
        attention = logits.softmax(-1)
    else:
        absent = ~mask.unsqueeze(1)
        # A finite number: if all tokens are masked, the softmax of -inf would be NaN.
        attention = logits.masked_fill(absent, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(absent, 0)
    return attention @ x, attention


def _check(x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None, **others: Tensor) -> None:
    if (x.dtype == torch.int8) != (scales is not None):
        raise InputError(
            f"multi_query_pool takes scales only with int8 tokens; got x: {x.dtype} "
            f"{'without' if scales is None else 'with'} scales."
        )
    check_alike("multi_query_pool", **({} if x.dtype == torch.int8 else {"x": x}), q=q, **others)
    if x.ndim != 3 or q.ndim != 2 or x.shape[2] != q.shape[1]:
        raise InputError(
            f"multi_query_pool takes x (B, N, D) and q (M, D); got x: {tuple(x.shape)}, q: {tuple(q.shape)}."
        )
    if scales is not None and (
        not scales.is_floating_point() or scales.shape != x.shape[:2] or not scales.device == x.device == q.device
    ):
        raise InputError(
            f"multi_query_pool takes int8 x and floating-point scales of shape {tuple(x.shape[:2])} on {q.device}, "
            f"the device of q; got {tuple(scales.shape)}, {scales.dtype} on {scales.device}, and x on {x.device}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.device != x.device or mask.shape != x.shape[:2]):
        raise InputError(
            f"multi_query_pool takes a mask of shape {tuple(x.shape[:2])}, torch.bool on {x.device}, True for valid "
            f"tokens; got {tuple(mask.shape)}, {mask.dtype} on {mask.device}."
        )


def _use_triton(x: Tensor, q: Tensor) -> bool:
    return q.dtype != torch.float64 and min(x.numel(), len(q)) > 0 and kernels_enabled(x.device)


@torch.library.custom_op("visionattn::multi_query_pool", mutates_args=())
def multi_query_pool(
    x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, q, mask, scales)
    return plain.forward(x, q, mask, scales)


@multi_query_pool.register_kernel("cuda")
def _(x, q, mask=None, scales=None) -> tuple[Tensor, Tensor]:
    _check(x, q, mask, scales)
    if not _use_triton(x, q):
        return plain.forward(x, q, mask, scales)
    from visionattn.kernels._triton import multi_query_pool as triton_kernels

    return triton_kernels.forward(x, q, mask, scales)


@multi_query_pool.register_fake
def _(x, q, mask=None, scales=None) -> tuple[Tensor, Tensor]:
    _check(x, q, mask, scales)
    (B, N, D), M = x.shape, q.shape[0]
    return q.new_empty(B, M, D), q.new_empty(B, M, N)


@torch.library.custom_op("visionattn::multi_query_pool_backward", mutates_args=())
def multi_query_pool_backward(
    grad_z: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    q: Tensor,
    scales: Tensor | None,
    attention: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, q, scales=scales, grad_z=grad_z, attention=attention)
    return plain.backward(grad_z, grad_attention, x, q, scales, attention, needs_x)


@multi_query_pool_backward.register_kernel("cuda")
def _(grad_z, grad_attention, x, q, scales, attention, needs_x) -> tuple[Tensor, Tensor]:
    _check(x, q, scales=scales, grad_z=grad_z, attention=attention)
    if not _use_triton(x, q):
        return plain.backward(grad_z, grad_attention, x, q, scales, attention, needs_x)
    from visionattn.kernels._triton import multi_query_pool as triton_kernels

    return triton_kernels.backward(grad_z, grad_attention, x, q, scales, attention, needs_x)


@multi_query_pool_backward.register_fake
def _(grad_z, grad_attention, x, q, scales, attention, needs_x):
    return x.new_empty(x.shape if needs_x else 0), q.new_empty(q.shape)


def _save(ctx, inputs, output) -> None:
    x, q, _, scales = inputs
    if scales is not None and scales.requires_grad:
        raise InputError("multi_query_pool does not support gradients of the scales: detach them.")
    ctx.save_for_backward(x, q, scales, output[1])
    ctx.set_materialize_grads(False)  # the attention mostly has no gradient


def _differentiate(ctx, grad_z: Tensor | None, grad_attention: Tensor | None):
    x, q, scales, attention = ctx.saved_tensors
    if grad_z is None:
        grad_z = q.new_zeros(len(x), len(q), x.shape[2])
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_q = torch.ops.visionattn.multi_query_pool_backward(
        grad_z, grad_attention, x, q, scales, attention, needs_x
    )
    return grad_x if needs_x else None, grad_q, None, None


def _gradient(
    grad_z: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    q: Tensor,
    scales: Tensor | None,
    attention: Tensor,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients as in the module; the attention is an output, whose own derivatives lead on to x and q."""

    def by_attention(grad_z, grad_attention, x, q, scales, attention) -> tuple[Tensor, Tensor]:
        tokens = x if scales is None else x.to(q.dtype) * scales.to(q.dtype).unsqueeze(2)
        e = grad_z @ tokens.transpose(1, 2)
        e = e if grad_attention is None else e + grad_attention
        d = attention * (e - (attention * e).sum(-1, keepdim=True)) * q.shape[1] ** -0.5
        by_x = attention.transpose(1, 2) @ grad_z + d.transpose(1, 2) @ q if needs_x else q.new_empty(0)
        return by_x, (d @ tokens).sum(0)

    by_x, by_q = widened(by_attention)(grad_z, grad_attention, x, q, scales, attention)
    return by_x.to(x.dtype), by_q


register(
    "multi_query_pool",
    definition=multi_query_pool_definition,
    check=_check,
    save=_save,
    differentiate=_differentiate,
    gradient=_gradient,
    kept=(3,),  # the scales
)


@register_flop_formula(torch.ops.visionattn.multi_query_pool)
def _(x, q, mask=None, scales=None, out_shape=None) -> int:
    """Products with the tokens as keys and as values."""
    B, N, D = x
    return 4 * B * N * D * q[0]


@register_flop_formula(torch.ops.visionattn.multi_query_pool_backward)
def _(grad_z, grad_attention, x, q, scales, attention, needs_x: bool, out_shape=None) -> int:
    """One product for each of the forward pass, and as many again for the gradient of x."""
    B, N, D = x
    return (8 if needs_x else 4) * B * N * D * q[0]
