"""Subspace attention: ULSAM's spatial gate, one softmax over the positions of a map for each group of channels.

The C channels are split into g subspaces of G = C / g adjacent ones. With n the subspace of channel c, p, q positions,

    t_cp = rho(scale_c x_cp + shift_c)                       rho: ReLU, or the identity without `rectify`
    l_np = sum over c in n of point_c max of t_cq            over the 3 x 3 positions q around p; -inf outside
    s_np = rho(weight_n (l_np - mean_n) / sqrt(var_n + eps) + offset_n)    mean and biased variance of l over B, H, W;
           rho(l_np + offset_n)                                            without a weight
    A_np = softmax over the H W positions of s_np
    y_cp = x_cp (1 + gain_n k A_np)                          k = H W where `scaled`, so that k A is 1 on average, or 1

    x       (B, C, H, W)
    scale   (C,)      a 1 x 1 depthwise convolution, `shift` its bias: (C,), or None for 0
    point   (g, G)    one 1 x 1 filter for each subspace
    weight  (g,)      normalises the logits with their own statistics, as batch norm does in training; None: no norm
    offset  (g,)      None for 0
    gain    (g,)      None for 1
    y       (B, C, H, W)    in the memory layout of `torch.empty_like(x)`
    l       (B, g, H, W)    returned for running statistics

ULSAM's paper has scale and point only. Its published module has all but the gain; its batch norm before the
first ReLU is an affine map of x.

Of equal maxima in a 3 x 3 window, the first in reading order receives the gradient, as in `F.max_pool2d`.

Dtypes: float64, float32, bfloat16, float16, the same for all tensors (autocast casts them together); half precision is
computed in float32.
Tolerance, forward and gradients, relative to the float64 result's largest magnitude, or to 1 if that is less:
    float64 1e-12, float32 2e-5, bfloat16 2e-2, float16 2e-3.
Form: the maximum of three columns, then of three rows, each as two passes over whole maps; PyTorch's CPU kernel of the
pool works window by window, and takes most of the time of the usual implementation in branches.
Kernels: Triton on CUDA; float64 there, empty batches, and other devices use the plain form.
Second derivatives, forward mode and the transforms of `torch.func` use the definition, with its memory cost.
Source: ULSAM, Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, arXiv 2006.15102.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import (
    check_alike,
    gradients,
    kernels_enabled,
    register,
    register_flop_formula,
    widened,
)
from visionattn.kernels._plain import subspace_attention as plain

__all__ = ["subspace_attention_definition"]


def subspace_attention_definition(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    point: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    rectify: bool,
    scaled: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch."""
    C, (H, W), g = x.shape[1], x.shape[2:], point.shape[0]
    t = torch.nn.functional.conv2d(x, scale.view(C, 1, 1, 1), shift, groups=C)
    t = torch.nn.functional.max_pool2d(t.relu() if rectify else t, 3, stride=1, padding=1)
    logits = torch.nn.functional.conv2d(t, point.view(g, -1, 1, 1), groups=g)  # (B, g, H, W)
    s = logits
    if weight is not None:
        var, mean = torch.var_mean(s, (0, 2, 3), correction=0, keepdim=True)
        s = (s - mean) * (var + eps).rsqrt() * weight.view(g, 1, 1)
    if offset is not None:
        s = s + offset.view(g, 1, 1)
    attention = (s.relu() if rectify else s).flatten(2).softmax(-1)
    if scaled:
        attention = attention * (H * W)
    if gain is not None:
        attention = attention * gain[:, None]
    attention = attention.unflatten(2, (H, W)).unsqueeze(2)  # (B, g, 1, H, W)
    y = x.unflatten(1, (g, -1))
    return (y + y * attention).flatten(1, 2), logits


def _check(x, scale, shift, point, weight, offset, gain, rectify, scaled, eps, **others: Tensor) -> None:
    optional = {"shift": shift, "weight": weight, "offset": offset, "gain": gain}
    vectors = {"scale": scale} | {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_alike("subspace_attention", x=x, point=point, **vectors, **others)
    wanted = "subspace_attention takes x (B, C, H, W) with at least one pixel and point (g, G) with g G = C"
    given = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in {"x": x, "point": point, **vectors}.items())
    if x.ndim != 4 or point.ndim != 2 or point.shape[0] * point.shape[1] != x.shape[1] or 0 in x.shape[1:]:
        raise InputError(f"{wanted}; got {given}.")
    C, g = x.shape[1], point.shape[0]
    if any(tensor.shape != (C if name in ("scale", "shift") else g,) for name, tensor in vectors.items()):
        raise InputError(f"{wanted}, scale and shift (C,), weight, offset and gain (g,); got {given}.")


def _use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and len(x) > 0 and kernels_enabled(x.device)


@torch.library.custom_op("visionattn::subspace_attention", mutates_args=())
def subspace_attention(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    point: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    rectify: bool,
    scaled: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    args = (x, scale, shift, point, weight, offset, gain, rectify, scaled, eps)
    _check(*args)
    return plain.forward(*args)


@subspace_attention.register_kernel("cuda")
def _(x: Tensor, *others) -> tuple[Tensor, Tensor]:
    _check(x, *others)
    if not _use_triton(x):
        return plain.forward(x, *others)
    from visionattn.kernels._triton import subspace_attention as triton_kernels

    return triton_kernels.forward(x, *others)


@subspace_attention.register_fake
def _(x, scale, shift, point, *others) -> tuple[Tensor, Tensor]:
    _check(x, scale, shift, point, *others)
    return torch.empty_like(x), plain.empty_logits(x, point)


@torch.library.custom_op("visionattn::subspace_attention_backward", mutates_args=())
def subspace_attention_backward(
    grad: Tensor,
    grad_logits: Tensor | None,
    logits: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    point: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    rectify: bool,
    scaled: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (x, scale, shift, point, weight, offset, gain, rectify, scaled, eps)
    _check(*args, grad=grad, logits=logits)
    return plain.backward(grad, grad_logits, logits, *args)


@subspace_attention_backward.register_kernel("cuda")
def _(grad, grad_logits, logits, x, *others):
    _check(x, *others, grad=grad, logits=logits)
    if not _use_triton(x):
        return plain.backward(grad, grad_logits, logits, x, *others)
    from visionattn.kernels._triton import subspace_attention as triton_kernels

    return triton_kernels.backward(grad, grad_logits, logits, x, *others)


@subspace_attention_backward.register_fake
def _(grad, grad_logits, logits, x, scale, shift, point, *others):
    _check(x, scale, shift, point, *others, grad=grad, logits=logits)
    C, (g, G) = scale.shape[0], point.shape
    vectors = (scale.new_empty(size) for size in (C, C, (g, G), g, g, g))
    return torch.empty_like(x), *vectors


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)  # the logits mostly have no gradient


def _differentiate(ctx, grad: Tensor | None, grad_logits: Tensor | None):
    logits, x, *others = ctx.saved_tensors
    grad = torch.zeros_like(x) if grad is None else grad
    grads = torch.ops.visionattn.subspace_attention_backward(grad, grad_logits, logits, x, *others, *ctx.settings)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None, None


def _gradient(grad: Tensor, grad_logits: Tensor | None, logits: Tensor, *args) -> tuple[Tensor, ...]:
    """The logits are recomputed, so that their derivatives are those of the arguments."""
    needed = [isinstance(arg, Tensor) for arg in args]
    found = gradients(widened(subspace_attention_definition), args, (grad, grad_logits), needed)[:7]
    C, (g, G) = args[0].shape[1], args[3].shape
    shapes = (args[0].shape, (C,), (C,), (g, G), (g,), (g,), (g,))
    return tuple(args[0].new_zeros(shape) if by is None else by for by, shape in zip(found, shapes))


register(
    "subspace_attention",
    definition=subspace_attention_definition,
    check=_check,
    save=_save,
    differentiate=_differentiate,
    gradient=_gradient,
)


@register_flop_formula(torch.ops.visionattn.subspace_attention)
def _(x, *others, out_shape=None) -> int:
    """Both 1 x 1 convolutions, one multiplication per element each."""
    B, C, H, W = x
    return 4 * B * C * H * W


@register_flop_formula(torch.ops.visionattn.subspace_attention_backward)
def _(grad, grad_logits, logits, x, *others, out_shape=None) -> int:
    """Two convolutions for each of the forward pass, as in autograd of the definition."""
    B, C, H, W = x
    return 8 * B * C * H * W
