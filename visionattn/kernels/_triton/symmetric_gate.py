"""Triton kernels of `visionattn.kernels.symmetric_gate`: one read of each input, one write of each output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward", "symmetric_gate_bwd_kernel", "symmetric_gate_fwd_kernel"]

# Eight elements per thread with four warps: one 16-byte access for bfloat16, two for float32.
BLOCK = 1024


@triton.jit
def symmetric_gate_fwd_kernel(h_ptr, x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    h = tl.load(h_ptr + offsets, mask=mask).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(out_ptr + offsets, (h + x) * (tl.sigmoid(h) - 0.5), mask=mask)


@triton.jit
def symmetric_gate_bwd_kernel(grad_ptr, h_ptr, x_ptr, grad_h_ptr, grad_x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=mask).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    s = tl.sigmoid(h)
    gate = s - 0.5
    tl.store(grad_h_ptr + offsets, grad * (gate + (h + x) * s * (1 - s)), mask=mask)
    tl.store(grad_x_ptr + offsets, grad * gate, mask=mask)


def forward(h: Tensor, x: Tensor) -> Tensor:
    """Launch the forward kernel. Any strides; the result is laid out like `torch.empty_like(h)`."""
    out = torch.empty_like(h)
    _launch(symmetric_gate_fwd_kernel, _dense(h, out), _dense(x, out), out)
    return out


def backward(grad: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel. Any strides; both results are laid out like `torch.empty_like(h)`."""
    grad_h, grad_x = torch.empty_like(h), torch.empty_like(h)
    inputs = (_dense(tensor, grad_h) for tensor in (grad, h, x))
    _launch(symmetric_gate_bwd_kernel, *inputs, grad_h, grad_x)
    return grad_h, grad_x


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of `like`, so that one offset addresses the same element in every buffer."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _launch(kernel, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(size, BLOCK),)](*tensors, size, BLOCK=BLOCK, enable_fp_fusion=True)
