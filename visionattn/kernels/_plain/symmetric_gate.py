"""The plain form of `visionattn.kernels.symmetric_gate` for CPUs.

Allocation is most of the cost on a CPU, so steps work in place: one buffer besides the result in the forward pass, none
besides the two results in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


def forward(h: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(h, out=torch.empty_like(h)).sub_(0.5).mul_(h + x)


def backward(grad: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(h, out=torch.empty_like(h))
    slope = torch.add(h, x, out=torch.empty_like(h))
    torch.ops.aten.sigmoid_backward.grad_input(slope, s, grad_input=slope)  # (h + x) * s * (1 - s)
    grad_x = s.sub_(0.5).mul_(grad)
    return torch.addcmul(grad_x, grad, slope, out=slope), grad_x
