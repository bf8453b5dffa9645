"""Tracing by torch.export, with some functions replaced by forms that suit an exported graph.

    our operators        their definitions, or forms for exported graphs (`visionattn.kernels.PlainForms`)
    attention            softmax(s Q K^T) V with one Transpose of K; the exporter's own form computes its shape part by
                         part, in 15 to 20 nodes an attention
    SAME padding         timm's numbers without max and ceil: the expression of a size then grows by a few signs with
                         each strided convolution, not three to four times
    ReLU6, hard tanh     clamp, one Clip; the exporter takes them apart, for more than half of its time in a MobileNet

The rest is traced as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from timm.layers import padding
from torch import Tensor, nn
from torch.export import ExportedProgram

from visionattn.kernels import PlainForms

__all__ = ["TIME_LIMIT", "trace"]

# Seconds of CPU time.
TIME_LIMIT = 300.0


class TimeLimitError(Exception):
    """Tracing has taken as long as it may."""


def trace(
    model: nn.Module, args: Sequence[Tensor], dims: Sequence[dict[int, Any]], time_limit: float = TIME_LIMIT
) -> ExportedProgram:
    """Trace a model.

    Args:
        model: In evaluation mode.
        args: Example inputs.
        dims: What is dynamic, for `torch.export`.
        time_limit: Seconds of CPU time that it may take. The tracer is asked between two operations.

    Raises:
        TimeLimitError: It takes longer.
        Exception: Whatever torch.export or the model raises.
    """
    with _same_padding(), _Forms(time_limit):
        return torch.export.export(model, tuple(args), dynamic_shapes=tuple(dims))


class _Forms(PlainForms):
    def __init__(self, time_limit: float) -> None:
        super().__init__()
        self.time_limit = time_limit
        self.start = time.process_time()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the form to export in place of a function, and all else as it is."""
        if time.process_time() - self.start > self.time_limit:
            raise TimeLimitError(
                f"tracing took more than {self.time_limit:g} s of CPU time; --time-limit (time_limit=) allows more."
            )
        func = _FORMS.get(func, func)
        return super().__torch_function__(func, types, args, kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, from whose documentation it is."""
    if is_causal or enable_gqa or dropout_p or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return x.clamp(min_val, max_val)


def _relu6(x: Tensor, inplace: bool = False) -> Tensor:
    return x.clamp(0, 6)


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
}


@contextmanager
def _same_padding() -> Iterator[None]:
    original: Callable[..., Any] = padding.get_same_padding

    def amount(size: Any, kernel_size: int, stride: int, dilation: int) -> Any:
        extent = dilation * (kernel_size - 1) + 1
        if isinstance(size, Tensor) or extent < stride:
            return original(size, kernel_size, stride, dilation)
        return ((size + stride - 1) // stride - 1) * stride + extent - size

    with mock.patch.object(padding, "get_same_padding", amount):
        yield
