"""Intercept the attention calls of a frozen model, independently of its classes.

The model is not changed. Within a context, every call of `torch.nn.functional.scaled_dot_product_attention` is passed
to a function, which sees queries, keys and values after norms, rotary embeddings and the split into heads:

    with observing(model, lambda call: print(call.layer, call.q.shape)):
        model(images)                                 # the result is unchanged
    with replacing(model, attention) as reached:      # attention(call) -> (B, heads, N, D), or None to leave the call
        model(images)
    print(reached.layers, reached.dense, reached.not_called)

Forward hooks find the name of the layer, and the grid from the patch embedding. They are removed when the context
ends. This works in eager mode, under `torch.compile` and in `torch.export`; a graph traced within the context keeps the
replacement. A context applies to the thread that opened it: other threads can run the same model unchanged. If contexts
are nested, the inner one is called first; the outer one gets the calls that the inner one leaves unchanged.

timm layers with `fused_attn=False`, which would compute the weights themselves, are set to call the function; this
changes results by rounding only. Not reached: attention that a class always computes itself (Swin v2, LeViT, XCiT,
linear attention), and `torch.nn.MultiheadAttention`, which hides the call. `Reached.not_called` names such layers.
"""

from __future__ import annotations

import fnmatch
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.errors import InputError, shorten

__all__ = ["Call", "Reached", "observing", "replacing"]

Grid = tuple[int, int]
Attention = Callable[["Call"], Tensor | None]

_EMBEDDING = re.compile(r"(^|\.)(patch_embed\w*|conv_proj)(\.\d+)?$")
CHOSEN = "the policy leaves it unchanged"  # reasons that are not errors
_INNER = "an inner context replaces it"
_active = threading.local()  # the innermost interception of each thread
_MOST_PREFIX_TOKENS = 16  # for a model that does not state how many it has


class Call(NamedTuple):
    """One call of scaled dot-product attention.

    Attributes:
        layer: Name of the calling module, as in `model.named_modules()`.
        number: Index of the layer, in the order of the layers' first calls.
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, D').
        scale: Factor of the logits.
        bias: Added to the logits, or a bool mask of valid keys; None if the call has none.
        grid: (H, W) if the tokens are a prefix followed by a grid, row by row; None otherwise (windows, pooled tokens,
            cross-attention).
        prefix: Number of prefix tokens (class token, registers), which come first; 0 without a grid.
        state: A dict shared by all layers of a forward pass, empty at its start.
    """

    layer: str
    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    grid: Grid | None
    prefix: int
    state: dict[Any, Any]


@dataclass
class Reached:
    """Which layers a context has reached so far.

    Attributes:
        layers: Names of the layers that were observed or replaced, in the order of their first call.
        dense: Names of the layers that call attention but were left unchanged, with the reason.
    """

    layers: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    _entered: list[str] = field(default_factory=list)
    _calling: list[str] = field(default_factory=list)
    _ran: bool = False
    _elsewhere: bool = False  # in another thread

    @property
    def not_called(self) -> list[str]:
        """Innermost attention layers that ran without calling scaled dot-product attention."""
        silent = [name for name in self._entered if name not in self._calling]
        return [name for name in silent if not any(other.startswith(f"{name}.") for other in silent)]

    def __str__(self) -> str:
        text = f"{len(self.layers)} layers reached"
        if self.dense:
            text += f", {len(self.dense)} left unchanged ({shorten(next(iter(self.dense.values())))})"
        if self.not_called:
            text += f", {len(self.not_called)} not reached ({shorten(', '.join(self.not_called))})"
        return text


@contextmanager
def observing(
    model: nn.Module, observer: Callable[[Call], object], layers: str | Sequence[str] = "*"
) -> Iterator[Reached]:
    """Pass every attention call of a model to an observer; results and gradients do not change.

    Args:
        model: Any model that calls `scaled_dot_product_attention`.
        observer: Called with a `Call` before the attention is computed. Its return value is ignored.
        layers: Pattern of layer names, or several, such as `"blocks.1?.attn"`.

    Yields:
        A `Reached`.

    Raises:
        InputError: At the end of the context, if the model ran and no layer was reached.
    """

    def watch(call: Call) -> None:
        observer(call)

    with _intercepting(model, watch, layers, observes=True) as reached:
        yield reached


@contextmanager
def replacing(model: nn.Module, attention: Attention, layers: str | Sequence[str] = "*") -> Iterator[Reached]:
    """Compute the attention of a model's layers with another function.

    For inference only: with gradient checkpointing, the recomputation in the backward pass would run outside the
    context and silently use the model's own attention.

    Args:
        model: A model in evaluation mode.
        attention: Takes a `Call` and returns (B, heads, N, D'), or None to leave the call unchanged.
        layers: Pattern of layer names, or several, such as `"blocks.1?.attn"`.

    Yields:
        A `Reached`.

    Raises:
        InputError: A call requires gradients or uses dropout; or, at the end of the context, the model ran and no layer
            was reached.
    """
    with _intercepting(model, attention, layers, observes=False) as reached:
        yield reached


class _Interception:
    """State of the current forward pass, shared by the hooks and the mode."""

    def __init__(self, prefix: int | None, wanted: frozenset[str], observes: bool) -> None:
        self.stated_prefix = prefix
        self.wanted = wanted
        self.observes = observes
        self.reached = Reached()
        self.stack: list[str] = []
        self.grid: Grid | None = None
        self.order: dict[str, int] = {}
        self.state: dict[Any, Any] = {}
        self.paused = False
        self.thread = threading.get_ident()
        self.outer: _Interception | None = getattr(_active, "innermost", None)

    def is_foreign(self) -> bool:
        """Whether a hook runs in another thread, to which the context does not apply."""
        if torch.compiler.is_compiling():  # thread identifiers cannot be traced
            return False
        return threading.get_ident() != self.thread

    def call(self, number: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Call:
        grid, prefix = self.grid, 0
        if grid is not None:
            prefix = q.shape[2] - grid[0] * grid[1]
            most = min(_MOST_PREFIX_TOKENS, grid[0] * grid[1])
            allowed = (0, self.stated_prefix) if self.stated_prefix is not None else range(most + 1)
            if k.shape[2] != q.shape[2] or prefix not in allowed:
                grid, prefix = None, 0
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return Call(self.stack[-1], number, q, k, v, scale, bias, grid, prefix, self.state)

    def note(self, name: str, reason: str | None) -> None:
        """Record a call: as reached, or as dense if there is a reason."""
        for outer in self.stack:
            if outer not in self.reached._calling:
                self.reached._calling.append(outer)
        if reason is not None:
            self.reached.dense[name] = reason
        elif name not in self.reached.layers:
            self.reached.layers.append(name)

    def pause_outer(self, paused: bool) -> None:
        at = self.outer
        while at is not None:
            at.paused = paused
            at = at.outer

    def note_taken(self) -> None:
        """Tell the outer contexts that this one replaced a call, which they do not get."""
        at = self.outer
        while at is not None:
            if at.stack:
                at.note(at.stack[-1], _INNER)
            at = at.outer


class _Mode(TorchFunctionMode):
    def __init__(self, attention: Attention, interception: _Interception) -> None:
        super().__init__()
        self.attention = attention
        self.interception = interception

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace scaled dot-product attention, and call every other function unchanged."""
        # A compiled graph enters no module: the replacement was traced into it.
        if func is F.scaled_dot_product_attention and self.interception.stack and not self.interception.paused:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        at = self.interception
        name = at.stack[-1]
        number = at.order.setdefault(name, len(at.order))
        result = None
        if is_causal:
            reason: str | None = "its attention is causal"
        elif query.ndim not in (3, 4):
            reason = f"its queries have {query.ndim} dimensions"
        elif name not in at.wanted:
            reason = "no pattern in layers matches it"
        else:
            call = at.call(number, *_with_heads(query, key, value, attn_mask, enable_gqa), scale)
            if not at.observes:
                _check_inference(call, dropout_p)
            at.pause_outer(True)  # calls that the function makes itself are not calls of the layer
            try:
                result = self.attention(call)
            finally:
                at.pause_outer(False)
            reason = None if at.observes or result is not None else _why_dense(call)
        at.note(name, reason)
        if result is not None:
            at.note_taken()
            return result if query.ndim == 4 else result.squeeze(1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _why_dense(call: Call) -> str:
    if call.grid is None:
        return "its tokens are not a prefix followed by a grid"
    return CHOSEN if call.bias is None else "it adds a bias to its logits"


def _with_heads(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grouped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and bias with four dimensions and equal numbers of heads; (B heads, N, D) has one head."""
    if q.ndim == 3:
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), bias if bias is None else bias.unsqueeze(-3)
    if grouped and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return q, k, v, bias


def _check_inference(call: Call, dropout_p: float) -> None:
    if call.q.requires_grad or call.k.requires_grad or call.v.requires_grad:
        raise InputError(
            f"The attention of {call.layer} requires gradients; replaced attention supports inference only. Run the "
            "model within torch.no_grad() or torch.inference_mode()."
        )
    if dropout_p:
        raise InputError(f"The attention of {call.layer} uses dropout. Call model.eval() first.")


@contextmanager
def _intercepting(
    model: nn.Module, attention: Attention, layers: str | Sequence[str], observes: bool
) -> Iterator[Reached]:
    patterns = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, Sequence) else (layers,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"layers must be a pattern of names such as 'blocks.*', or several; got {shorten(layers)}.")
    names = [name for name, _ in model.named_modules()]
    wanted = frozenset(n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns))
    at = _Interception(getattr(model, "num_prefix_tokens", None), wanted, observes)
    handles, unfused = [model.register_forward_pre_hook(_run_hook(at))], []
    try:
        for name, module in model.named_modules():
            if _EMBEDDING.search(name):
                handles.append(module.register_forward_hook(_grid_hook(at)))
            if not getattr(module, "fused_attn", True):
                module.fused_attn = True
                unfused.append(module)
            named = isinstance(module, nn.MultiheadAttention) or not type(module).__module__.startswith("torch.nn.")
            if named and name:
                handles.append(module.register_forward_pre_hook(_enter_hook(at, name, _is_attention(module))))
                handles.append(module.register_forward_hook(_leave_hook(at, name)))
        _active.innermost = at
        with _Mode(attention, at):
            yield at.reached
    finally:
        _active.innermost = at.outer
        for handle in handles:
            handle.remove()
        for module in unfused:
            module.fused_attn = False
    _check_reached(type(model).__name__, patterns, at.reached)


def _check_reached(model: str, patterns: Sequence[str], found: Reached) -> None:
    """Raise `InputError` if the model ran and the context had no effect."""
    if found.layers or {CHOSEN, _INNER} & set(found.dense.values()):
        return
    if not found._ran:
        if found._elsewhere:
            raise InputError(f"{model} ran in another thread only. Open the context in the thread that runs it.")
        return
    if found.dense:
        reason = next(iter(found.dense.values()))
        raise InputError(
            f"No attention layer of {model} was reached: layers is {shorten(', '.join(patterns))!r}; "
            f"{shorten(', '.join(found.dense))} call attention, but {reason}."
        )
    silent = f"{shorten(', '.join(found.not_called))} do not call" if found.not_called else "no layer calls"
    raise InputError(
        f"No attention layer of {model} was reached: {silent} "
        "torch.nn.functional.scaled_dot_product_attention. Use a model whose attention does, such as timm's ViT."
    )


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or isinstance(getattr(module, "num_heads", None), int)


def _run_hook(at: _Interception) -> Callable[..., None]:
    def run(module: nn.Module, inputs: Any) -> None:
        if at.is_foreign():
            at.reached._elsewhere = True
        else:
            at.reached._ran = True

    return run


def _enter_hook(at: _Interception, name: str, attention: bool) -> Callable[..., None]:
    def enter(module: nn.Module, inputs: Any) -> None:
        if at.is_foreign():
            at.reached._elsewhere = True
            return
        at.reached._ran = True
        at.stack.append(name)
        if attention and name not in at.reached._entered:
            at.reached._entered.append(name)

    return enter


def _leave_hook(at: _Interception, name: str) -> Callable[..., None]:
    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if at.is_foreign():
            return
        # Names left by an exception are above this one on the stack.
        while at.stack and at.stack.pop() != name:
            pass

    return leave


def _grid_hook(at: _Interception) -> Callable[..., None]:
    def take(module: nn.Module, inputs: Any, output: Any) -> None:
        if at.is_foreign():
            return
        at.grid = _grid(module, inputs[0] if inputs else None, output)
        at.state.clear()

    return take


def _grid(embedding: Any, image: Any, output: Any) -> Grid | None:
    """Grid of patches of an embedding's output: a map (B, H, W, C) or (B, C, H, W), or tokens (B, N, C)."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return None
    if output.ndim == 4:
        last = "NHWC" in str(getattr(embedding, "output_fmt", "")) and not isinstance(embedding, nn.Conv2d)
        return (output.shape[1], output.shape[2]) if last else (output.shape[2], output.shape[3])
    candidates = [getattr(embedding, "grid_size", None)]
    patch = getattr(embedding, "patch_size", None)
    if patch is not None and isinstance(image, Tensor) and image.ndim == 4:
        height, width = (patch, patch) if isinstance(patch, int) else patch
        candidates.insert(0, (image.shape[2] // height, image.shape[3] // width))
    for size in candidates:
        if size is not None and size[0] * size[1] == output.shape[1]:
            return (int(size[0]), int(size[1]))
    return None
