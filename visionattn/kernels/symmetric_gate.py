"""Symmetric gate: SPAN's parameter-free attention.

    out = (h + x) * (sigmoid(h) - 0.5)

    h    any shape          features after the block's convolutions
    x    the shape of h     the block's input; nothing is broadcast
    out  the shape of h     in the memory layout of `torch.empty_like(h)`: channels-last in, channels-last out

With s = sigmoid(h) and a cotangent g, the gradients are

    grad_x = g * (s - 0.5)
    grad_h = g * ((s - 0.5) + (h + x) * s * (1 - s))

They need only h and x; autograd of the definition keeps three tensors of that size. On CPUs that multiply bfloat16
it is still used for bfloat16 gradients: recomputing the sigmoid takes longer.

Dtypes: float64, float32, bfloat16, float16; h and x of one dtype (autocast casts them together).
Tolerance, forward and gradients, relative to the float64 result's largest magnitude, or to 1 if that is less:
    float64 1e-14, float32 1e-6, bfloat16 2e-2, float16 2e-3. (Outside the Triton kernels, bfloat16 and float16 round
    sigmoid(h) before 0.5 is subtracted, as in the definition: the gate error is then up to 2^-9 and 2^-12.)
Kernels: Triton on CUDA, computing in float32; float64 there, and other devices, use the plain form.
Second derivatives, forward mode and the transforms of `torch.func` use the definition, with its memory cost.
Source: SPAN, Swift Parameter-free Attention Network, arXiv 2311.12770.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import check_alike, kernels_enabled, register, register_flop_formula
from visionattn.kernels._plain import symmetric_gate as plain

__all__ = ["symmetric_gate_definition"]


def symmetric_gate_definition(h: Tensor, x: Tensor) -> Tensor:
    """The definition, in plain PyTorch."""
    return (h + x) * (torch.sigmoid(h) - 0.5)


def _check(**tensors: Tensor) -> None:
    check_alike("symmetric_gate", **tensors)
    h = tensors["h"]
    if any(tensor.shape != h.shape for tensor in tensors.values()):
        given = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"symmetric_gate takes tensors of the same shape; got {given}. Nothing is broadcast.")


def _use_triton(h: Tensor) -> bool:
    return h.dtype != torch.float64 and kernels_enabled(h.device)


@torch.library.custom_op("visionattn::symmetric_gate", mutates_args=())
def symmetric_gate(h: Tensor, x: Tensor) -> Tensor:
    _check(h=h, x=x)
    return plain.forward(h, x)


@symmetric_gate.register_kernel("cuda")
def _(h: Tensor, x: Tensor) -> Tensor:
    _check(h=h, x=x)
    if not _use_triton(h):
        return plain.forward(h, x)
    from visionattn.kernels._triton import symmetric_gate as triton_kernels

    return triton_kernels.forward(h, x)


@symmetric_gate.register_fake
def _(h: Tensor, x: Tensor) -> Tensor:
    _check(h=h, x=x)
    return torch.empty_like(h)


@torch.library.custom_op("visionattn::symmetric_gate_backward", mutates_args=())
def symmetric_gate_backward(grad: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad=grad, h=h, x=x)
    return plain.backward(grad, h, x)


@symmetric_gate_backward.register_kernel("cuda")
def _(grad: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad=grad, h=h, x=x)
    if not _use_triton(h):
        return plain.backward(grad, h, x)
    from visionattn.kernels._triton import symmetric_gate as triton_kernels

    return triton_kernels.backward(grad, h, x)


@symmetric_gate_backward.register_fake
def _(grad: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad=grad, h=h, x=x)
    return torch.empty_like(h), torch.empty_like(h)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.visionattn.symmetric_gate_backward(grad, *ctx.saved_tensors)


register(
    "symmetric_gate",
    definition=symmetric_gate_definition,
    check=lambda h, x: _check(h=h, x=x),
    save=_save,
    differentiate=_differentiate,
    plain_in_bfloat16=True,
)


@register_flop_formula([torch.ops.visionattn.symmetric_gate, torch.ops.visionattn.symmetric_gate_backward])
def _(*shapes, out_shape=None) -> int:
    """Zero, as for the definition: PyTorch counts multiplications of contractions only, and there are none."""
    return 0
