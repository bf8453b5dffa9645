"""The cost of a network: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Savings", "count_macs", "count_parameters"]


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, *input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one forward pass for a batch of one, counted on the meta device: without computation.

    Matrix products, convolutions and attention products are counted, half of the value of torch's FLOP counter;
    element-wise operations are not.

    Args:
        model: Network; it is copied, not changed.
        *input_size: Size of each input without the batch, such as `(3, 224, 224)`.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    inputs = [torch.empty(1, *size, dtype=dtype, device="meta") for size in input_size]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


class Savings(NamedTuple):
    """Parameters and multiply-accumulates (per image) of a model before and after a change."""

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    def __repr__(self) -> str:
        parameters = _difference(self.parameters_before, self.parameters_after, 1, "parameters")
        return f"{parameters}; {_difference(self.macs_before, self.macs_after, 1e6, 'M multiply-accumulates')}"


def _difference(before: int, after: int, unit: float, name: str) -> str:
    digits = 0 if unit == 1 else 2
    return (
        f"{before / unit:,.{digits}f} -> {after / unit:,.{digits}f} {name} "
        f"({(after - before) / unit:+,.{digits}f}, {(after - before) / before:+.1%})"
    )
