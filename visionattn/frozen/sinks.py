r"""Attention sinks: detect tokens that take much attention and carry little information, and redistribute it.

Three detectors. The last one has no threshold to choose and is the default:

    channels   token t with max_c x_tc^2 / sum_c x_tc^2 > share            x: the layer's input
    received   column j with N mean_i A_ij > factor                        1: the uniform share
    outliers   values above Q3 + 1.5 (Q3 - Q1), of the attention of the class token summed over heads

Redistribution, for weights A whose rows sum to 1, sinks S, receivers R and a factor beta, in the selected rows:

    A'_ij = beta A_ij                                                      j in S
    A'_ij = A_ij + (1 - beta) (sum_S A_i.) A_ij / sum_R A_i.               j in R; rows sum to 1 as before

Emphasis, on logits: s' = s + a |s| with a = alpha on local tokens and a = beta on summary tokens.

Sources, each with its authors' code: VAR, "visual attention sink" (channels, rows of `attends_image`), whose threshold
|x / rms(x)| > 20 no token of fewer than 400 channels can pass, so that here it is a share of the token's energy,
tau^2 / C; ACT, "attention calibration technique" (received); PAINT, "fixing imbalanced attention" (outliers, emphasis).
All three were made for language models; no result on vision backbones is published.

Deviation: ACT excludes one sink, whichever column that is, and lets sinks receive attention while decoding, so that a
row sums to 1.44. Here S and R are arguments, and rows always sum to 1.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import InputError, shorten
from visionattn.frozen.calls import Call, Reached, replacing

__all__ = [
    "DETECTORS",
    "attends_image",
    "channel_share",
    "channel_sinks",
    "emphasise",
    "emphasising",
    "local_tokens",
    "outliers",
    "received_attention",
    "received_sinks",
    "redistribute",
    "redistributing",
    "take_at_random",
]

DETECTORS = ("outliers", "received", "random")
FACTOR = 10.0  # a column that receives more than this many times the uniform share is a sink


def channel_share(x: Tensor, channels: Sequence[int] | Tensor | None = None) -> Tensor:
    """Largest share of a token's energy in one channel.

    Args:
        x: Tokens (..., N, C).
        channels: Indices of the channels to consider; None: all.

    Returns:
        (..., N), from 1 / C to 1 if all channels are considered.
    """
    energy = x.square()
    total = energy.sum(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
    return (energy if channels is None else energy[..., torch.as_tensor(channels)]).amax(dim=-1) / total


def channel_sinks(x: Tensor, share: float = 0.1, channels: Sequence[int] | Tensor | None = None) -> Tensor:
    """Whether tokens (..., N, C) have more than a share of their energy in one of the channels, bool (..., N)."""
    return channel_share(x, channels) > share


def received_attention(weights: Tensor) -> Tensor:
    """Mean attention received by columns, in units of the uniform share: (..., N, M) -> (..., M), 1 on average."""
    return weights.mean(dim=-2) * weights.shape[-1]


def received_sinks(weights: Tensor, factor: float = FACTOR) -> Tensor:
    """Whether columns receive more than `factor` times the uniform share: (..., N, M) -> bool (..., M)."""
    return received_attention(weights) > factor


def outliers(values: Tensor) -> Tensor:
    """Tukey's rule: whether values lie above Q3 + 1.5 (Q3 - Q1) of the last axis, bool."""
    low, high = torch.quantile(values.float() if values.dtype != torch.float64 else values, _quartiles(values), dim=-1)
    return values > (high + 1.5 * (high - low))[..., None]


def _quartiles(values: Tensor) -> Tensor:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.tensor([0.25, 0.75], dtype=dtype, device=values.device)


def local_tokens(first: Tensor, summary: Tensor, share: float = 0.25) -> Tensor:
    """PAINT's local tokens: those with the largest class attention (..., N) in layer 1, without summary tokens."""
    count = int(share * first.shape[-1])
    chosen = torch.zeros_like(first, dtype=torch.bool).scatter(-1, first.topk(count, dim=-1).indices, True)
    return chosen & ~summary


def redistribute(
    weights: Tensor, sinks: Tensor, receivers: Tensor | None = None, beta: float = 0.4, rows: Tensor | None = None
) -> Tensor:
    """Move a share of the attention on sinks to other columns, in proportion to the weights of these.

    Args:
        weights: Attention weights A, (..., N, M).
        sinks: Columns S, bool, (M,) or (..., 1, M).
        receivers: Columns R, of the same shape; None: all others. Columns in both sets are sinks.
        beta: Share of their attention that sinks keep, from 0 to 1. ACT uses 0.4, VAR 0.6.
        rows: Rows to change, bool (..., N); None: all.

    Returns:
        A', (..., N, M). A row without attention on receivers is unchanged.

    Raises:
        InputError: beta is out of range.
    """
    if not 0 <= beta <= 1:
        raise InputError(f"beta must be from 0 to 1; got {shorten(beta)}.")
    receivers = ~sinks if receivers is None else receivers & ~sinks
    on_sinks = (weights * sinks).sum(dim=-1, keepdim=True)
    on_receivers = (weights * receivers).sum(dim=-1, keepdim=True)
    gain = (1 - beta) * on_sinks / torch.where(on_receivers > 0, on_receivers, 1.0)
    changed = torch.where(sinks, beta * weights, torch.where(receivers, weights * (1 + gain), weights))
    apply = on_receivers > 0
    if rows is not None:
        apply = apply & rows[..., None]
    return torch.where(apply, changed, weights)


def attends_image(weights: Tensor, image: Tensor, sinks: Tensor, least: float = 0.2, most: float = 0.5) -> Tensor:
    """VAR's choice of rows: those that attend to the image enough, and not only to its sinks.

    Args:
        weights: Attention weights, (..., N, M).
        image: Columns of the image, bool (M,).
        sinks: Columns that are sinks, bool (M,).
        least: Minimum attention on the image.
        most: Maximum share of this attention that is on sinks.

    Returns:
        Bool (..., N).
    """
    on_image = (weights * image).sum(dim=-1)
    on_sinks = (weights * (image & sinks)).sum(dim=-1)
    return (on_image >= least) & (on_sinks <= most * on_image)


def emphasise(logits: Tensor, local: Tensor, summary: Tensor, alpha: float = 0.7, beta: float = 0.3) -> Tensor:
    """PAINT's emphasis on the logits (..., M) of local and summary tokens, which are bool masks (..., M)."""
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    factor = torch.where(local, alpha, torch.where(summary, beta, zero))
    return logits + factor * logits.abs()


def redistributing(
    model: nn.Module,
    beta: float = 0.4,
    detector: str = "outliers",
    layers: str | Sequence[str] = "*",
    heads: dict[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> AbstractContextManager[Reached]:
    """Redistribute the attention of the class token and of attentive pooling within a context.

        with redistributing(model, beta=0.4, layers="blocks.1?.attn"):
            model(images)

    Only the row of the class token is recomputed, N h multiply-accumulates per layer; in attentive pooling (fewer
    queries than keys) all rows are. Prefix tokens neither give nor receive attention.

    Args:
        model: A model in evaluation mode.
        beta: Share of their attention that sinks keep.
        detector: `"outliers"` of the row's attention summed over heads; `"received"`, columns that receive more than 10
            times the uniform share; `"random"`, the control: as much attention as `"outliers"` would move, from random
            columns.
        layers: Pattern of layer names, or several.
        heads: Patterns of layer names, with the heads that are changed; None: all heads.
        seed: Seed of `"random"`.

    Raises:
        InputError: An argument is not accepted; or, in the context, gradients are required or no layer is reached.
    """
    if detector not in DETECTORS:
        raise InputError(f"detector must be one of {', '.join(map(repr, DETECTORS))}; got {shorten(detector)!r}.")
    if not 0 <= beta <= 1:
        raise InputError(f"beta must be from 0 to 1; got {shorten(beta)}.")
    generator = torch.Generator().manual_seed(seed)

    def edit(call: Call, logits: Tensor) -> Tensor:
        weights = logits.softmax(dim=-1)
        patches = torch.arange(weights.shape[-1], device=weights.device) >= call.prefix
        found = outliers(weights[..., call.prefix :].sum(dim=1, keepdim=True))
        sinks = F.pad(found, (call.prefix, 0))
        if detector == "received":
            whole = (call.q @ call.k.transpose(-2, -1) * call.scale + _added(call)).softmax(dim=-1)
            sinks = received_sinks(whole).any(dim=1, keepdim=True)[..., None, :] & patches
        if detector == "random":
            moved = (1 - beta) * (weights * sinks).sum(dim=-1, keepdim=True)
            return take_at_random(weights, patches, moved, generator)
        return redistribute(weights, sinks, patches, beta)

    return _editing(model, edit, layers, heads)


def emphasising(
    model: nn.Module, alpha: float = 0.7, beta: float = 0.3, layers: str | Sequence[str] = "*"
) -> AbstractContextManager[Reached]:
    """Emphasise local and summary tokens in the row of the class token (see `emphasise`) within a context.

    Local tokens are those of the first layer that is reached. Summary tokens are the outliers of the current layer: the
    penultimate layer, which the source uses, has not run yet.
    """

    def edit(call: Call, logits: Tensor) -> Tensor:
        weights = logits.softmax(dim=-1)[..., call.prefix :].sum(dim=1, keepdim=True)
        summary = outliers(weights)
        local = local_tokens(call.state.setdefault("first", weights), summary)
        local, summary = (F.pad(mask, (call.prefix, 0)) for mask in (local, summary))
        return emphasise(logits, local, summary, alpha, beta).softmax(dim=-1)

    return _editing(model, edit, layers, None)


def _editing(
    model: nn.Module,
    edit: Callable[[Call, Tensor], Tensor],
    layers: str | Sequence[str],
    heads: dict[str, Sequence[int]] | None,
) -> AbstractContextManager[Reached]:
    """Replace the weights (B, heads, 1 or M, N) of the class token's row, or of all rows of attentive pooling."""

    def attend(call: Call) -> Tensor | None:
        pooling = call.q.shape[2] < call.k.shape[2]
        if not (pooling or (call.grid is not None and call.prefix)):
            return None
        rows = call.q.shape[2] if pooling else 1
        logits = call.q[:, :, :rows] @ call.k.transpose(-2, -1) * call.scale + _added(call, rows)
        ours = edit(call, logits) @ call.v
        whole = F.scaled_dot_product_attention(call.q, call.k, call.v, call.bias, scale=call.scale)
        if heads is not None:
            chosen = [h for pattern, some in heads.items() if fnmatch.fnmatchcase(call.layer, pattern) for h in some]
            mask = torch.zeros(ours.shape[1], dtype=torch.bool, device=ours.device)
            mask[chosen] = True
            ours = torch.where(mask[:, None, None], ours, whole[:, :, :rows])
        return torch.cat([ours, whole[:, :, rows:]], dim=2)

    return replacing(model, attend, layers)


def _added(call: Call, rows: int | None = None) -> Tensor | float:
    """The bias of the first rows, as values to add to the logits."""
    bias = call.bias
    if bias is None:
        return 0.0
    bias = bias[..., :rows, :] if rows is not None and bias.shape[-2] > 1 else bias
    return (
        torch.zeros_like(bias, dtype=call.q.dtype).masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else bias
    )


def take_at_random(weights: Tensor, patches: Tensor, moved: Tensor, generator: torch.Generator) -> Tensor:
    """Move an amount of attention of each row from random columns to the others."""
    order = torch.rand(weights.shape[0], 1, 1, weights.shape[-1], generator=generator).to(weights.device)
    order = order.masked_fill(~patches, 2.0).argsort(dim=-1).expand_as(weights)
    sums = weights.gather(-1, order).cumsum(dim=-1) - weights.gather(-1, order)
    taken = torch.zeros_like(patches.expand_as(weights)).scatter(-1, order, sums < 2 * moved) & patches
    on_taken = (weights * taken).sum(dim=-1, keepdim=True)
    share = torch.where(on_taken > 0, moved / on_taken.clamp_min(1e-30), 0.0).clamp_max(1.0)
    others = ~taken & patches
    on_others = (weights * others).sum(dim=-1, keepdim=True)
    given = 1 + share * on_taken / on_others.clamp_min(1e-30)
    changed = torch.where(taken, weights * (1 - share), torch.where(others, weights * given, weights))
    return torch.where(on_others > 0, changed, weights)
