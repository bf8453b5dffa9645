"""Tracing by torch.export, with some functions replaced by forms suited to an exported graph.

    our operators        their definitions, or forms for exported graphs (`visionattn.kernels.PlainForms`)
    attention            softmax(s Q K^T) V with one Transpose of K; the exporter's own form computes the shape of that
                         piece by piece, in 15 to 20 nodes per attention
    SAME padding         timm's values without max and ceil: the expression of a size then grows by a few symbols with
                         each strided convolution, instead of three- to fourfold
    ReLU6, hard tanh     clamp, one Clip; the exporter decomposes them, which takes over half of its time in a MobileNet
    pixel unshuffle      a transpose; exporters of some versions of PyTorch write SpaceToDepth, whose channels are in
                         another order

Everything else is traced unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from timm.layers import padding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from visionattn.errors import ExportError
from visionattn.export.budget import Budget
from visionattn.export.spec import ExportSpec, size_text
from visionattn.kernels import PlainForms

__all__ = ["refusal", "trace", "trace_graph"]


def trace(model: nn.Module, args: Sequence[Tensor], dims: Sequence[dict[int, Any]], budget: Budget) -> ExportedProgram:
    """Trace a model.

    Args:
        model: In evaluation mode.
        args: Example inputs.
        dims: Dynamic axes, for `torch.export`.
        budget: The time limit; checked between two operations.

    Raises:
        TimeLimitError: Tracing takes longer.
        Exception: Whatever torch.export or the model raises.
    """
    with _same_padding(), _Forms(budget):
        return torch.export.export(model, tuple(args), dynamic_shapes=tuple(dims))


def trace_graph(model: nn.Module, inputs: Sequence[Tensor], spec: ExportSpec, budget: Budget) -> ExportedProgram:
    """Trace a model with the dynamic axes of its metadata.

    Args:
        model: In evaluation mode.
        inputs: Example inputs, with more than one element on each dynamic axis, since 1 is a special case.
        spec: The metadata.
        budget: The time limit.

    Raises:
        ExportError: The model cannot be traced.
    """
    units: dict[str, Any] = {}
    if spec.size_multiple > 1:
        # Declaring a size as a multiple avoids branches on remainders, which the tracer could not resolve.
        least = max(1, (spec.size_minimum or 1) // spec.size_multiple)
        units = {name: spec.size_multiple * Dim(f"{name}_units", min=least) for name in ("height", "width")}
    dims = [{axis: units.get(name, Dim.DYNAMIC) for axis, name in axes.items()} for axes in spec.axes]
    try:
        return trace(model, inputs, dims, budget)
    # The tracer raises whatever the traced code raises, and many exceptions of its own.
    except Exception as error:
        raise refusal("torch.export", spec, error) from error


def refusal(who: str, spec: ExportSpec, error: Exception) -> ExportError:
    """The error to raise when a tool cannot export a model: tool, model, reason and remedy."""
    size = size_text(*spec.input_size[1:])
    dynamic = f" with dynamic {', '.join(spec.dynamic_axes)}" if spec.dynamic_axes else ""
    text = f"{who} cannot export {spec.model}{dynamic}. Reason: {_reason(error)}"
    if spec.dynamic_size:
        text += f" To export one fixed size ({size}) instead, use --static-size (dynamic_size=False)."
    return ExportError(text)


def _reason(error: BaseException) -> str:
    """The lines of an exporter's long message that state the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([line for line in lines if line.startswith("- ")][:3] or lines[:1])


class _Forms(PlainForms):
    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the exportable form of a function if there is one, otherwise the function itself."""
        self.budget.check("tracing")
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
    """Like `torch.nn.functional.scaled_dot_product_attention`, after its documentation."""
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


def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    blocks = x.unflatten(-1, (-1, downscale_factor)).unflatten(-3, (-1, downscale_factor))  # (..., C, h, r, w, r)
    return blocks.movedim((-3, -1), (-4, -3)).flatten(-5, -3)


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.pixel_unshuffle: _pixel_unshuffle,
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
