"""Fewer attention heads in a frozen transformer: `visionattn.prune_heads(model, images, 0.5)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from visionattn.blocks import MinimalAttention
from visionattn.cost import Savings, count_macs, count_parameters
from visionattn.errors import InputError, shorten
from visionattn.frozen.batches import batches_of, run_on
from visionattn.mixers.moh import MixtureOfHeadsMixer
from visionattn.swapping import image_size

__all__ = ["HEAD_SCORES", "head_scores", "prune_heads"]

HEAD_SCORES = ("usage", "norm", "gradient", "random")


def prune_heads(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    keep: float,
    score: str = "usage",
    labels: Tensor | None = None,
    seed: int = 0,
) -> Savings:
    """Remove the attention heads with the lowest scores from a transformer, in place and without training.

        model = timm.create_model("vit_small_patch16_224", pretrained=True)
        print(visionattn.prune_heads(model, images, 0.75))
        visionattn.export(model, "pruned.onnx")

    The rows of `qkv` and the columns of `proj` that belong to a head are removed, so that the layers become smaller
    linear layers. The result equals setting these columns to zero. Heads are ranked over all layers, and each layer
    keeps at least one.

    The scores, for a head h with output A_h V_h W_h for each token:

        usage      share of the tokens for which |A_h V_h W_h| is the largest in the layer; in a mixture of heads, the
                   share of the tokens that are routed to the head, and 1 for shared heads
        norm       mean |A_h V_h W_h|
        gradient   mean over images of |dL / dg_h| for a gate g_h = 1 on the head and the cross-entropy L
        random     the control

    Sources: usage follows the idea of SHRP (one top-1 count for routing and pruning), of which only the abstract is
    published, so that the definition is this package's own; gradient is that of "Are sixteen heads really better than
    one?".

    Args:
        model: A transformer whose layers are timm's `Attention` or `MinimalAttention` with projected values.
        images: Normalised images (n, C, H, W), or batches of them.
        keep: Share of all heads that stay, above 0 and at most 1.
        score: `"usage"`, `"norm"`, `"gradient"` or `"random"`.
        labels: Classes of the images, int64 (n,); required by `"gradient"`.
        seed: Seed of `"random"`.

    Returns:
        Parameters, and multiply-accumulates per image, before and after.

    Raises:
        InputError: The model has no such layers, or an argument is out of range. The model is then unchanged.
    """
    layers = _layers(model)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise InputError(f"keep must be a share of the heads, above 0 and at most 1; got {shorten(keep)}.")
    scores = head_scores(model, images, score, labels, seed)
    size = image_size(model)
    before = count_parameters(model), count_macs(model, size)
    for name, kept in _choose(scores, keep).items():
        _cut(layers[name], kept)
    return Savings(before[0], count_parameters(model), before[1], count_macs(model, size))


def head_scores(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    score: str = "usage",
    labels: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of the heads of each attention layer, float64 (heads,), by layer name; arguments: see `prune_heads`."""
    layers = _layers(model)
    if score not in HEAD_SCORES:
        raise InputError(f"score must be one of {', '.join(map(repr, HEAD_SCORES))}; got {shorten(score)!r}.")
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(_heads(layer), generator=generator).double() for n, layer in layers.items()}
    batches = batches_of(images)
    if score == "gradient":
        return _gradients(model, layers, batches, labels)
    count = _used if score == "usage" else _norms
    totals = {name: torch.zeros(_heads(layer), dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    finite = dict.fromkeys(layers, True)

    def record(name: str) -> Callable:
        def hook(layer: Any, inputs: tuple) -> None:
            norms = _output_norms(layer, inputs[0])  # (B, N, heads)
            finite[name] &= bool(norms.isfinite().all())
            totals[name] += count(norms).sum(dim=(0, 1)).double().cpu()
            tokens[name] += norms.shape[0] * norms.shape[1]

        return hook

    def route(name: str, mixer: MixtureOfHeadsMixer) -> Callable:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            chosen = mixer.gates(inputs[0]) > 0
            totals[name] += chosen.sum(dim=(0, 1)).double().cpu()
            tokens[name] += chosen.shape[0] * chosen.shape[1]

        return hook

    handles = []
    for name, layer in layers.items():
        mixer = getattr(layer, "mixer", None)
        if score == "usage" and isinstance(mixer, MixtureOfHeadsMixer):
            handles.append(layer.register_forward_pre_hook(route(name, mixer)))
        else:
            # The hook reads the number of heads from the attention layer: the projection does not have it.
            hook = record(name)
            handles.append(layer.proj.register_forward_pre_hook(lambda _, x, f=hook, at=layer: f(at, x)))
    _run(model, batches, handles)
    _check_finite(finite)
    return {name: total / tokens[name] for name, total in totals.items()}


@torch.no_grad()
def _run(model: nn.Module, batches: list[Tensor], handles: list[Any]) -> None:
    training = model.training
    like = next(model.parameters())
    try:
        model.eval()
        for batch in batches:
            run_on(model, batch.to(like), model)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _output_norms(layer: Any, y: Tensor) -> Tensor:
    """|A_h V_h W_h| of each token and head from the input of the projection: (B, N, h D) -> (B, N, h)."""
    heads = _heads(layer)
    y = y.unflatten(-1, (heads, -1))  # (B, N, h, D)
    weight = layer.proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (h, D, C)
    gram = weight @ weight.transpose(1, 2)  # (h, D, D)
    return torch.einsum("bnhd,hde,bnhe->bnh", y, gram, y).clamp_min(0).sqrt()


def _used(norms: Tensor) -> Tensor:
    return F.one_hot(norms.argmax(dim=2), norms.shape[2])


def _norms(norms: Tensor) -> Tensor:
    return norms


def _gradients(
    model: nn.Module, layers: dict[str, Any], batches: list[Tensor], labels: Tensor | None
) -> dict[str, Tensor]:
    """Mean |gradient| of the gates, with a gate per image: in a sum over a batch, images would cancel."""
    count = sum(map(len, batches))
    if labels is None or len(labels) != count:
        given = "none" if labels is None else str(len(labels))
        raise InputError(f"score 'gradient' requires a label for each of the {count} images; got {given}.")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise InputError(f"labels must be an int64 tensor of shape ({count},); got {shorten(repr(labels))}.")
    like = next(model.parameters())
    totals = {name: torch.zeros(_heads(layer), dtype=torch.float64) for name, layer in layers.items()}
    gates: dict[str, Tensor] = {}

    def gate(name: str, heads: int) -> Callable:
        def hook(projection: nn.Module, inputs: tuple) -> tuple:
            y = inputs[0].unflatten(-1, (heads, -1))
            gates[name] = torch.ones(y.shape[0], 1, heads, 1, device=y.device, dtype=y.dtype, requires_grad=True)
            return ((y * gates[name]).flatten(2),)

        return hook

    handles = [layer.proj.register_forward_pre_hook(gate(n, _heads(layer))) for n, layer in layers.items()]
    training = model.training
    try:
        model.eval()
        for batch, wanted in zip(batches, labels.split([len(batch) for batch in batches]), strict=True):
            with torch.enable_grad():
                logits = run_on(model, batch.to(like), model)
                classes = logits.shape[-1]
                if logits.ndim != 2 or not 0 <= int(wanted.min()) <= int(wanted.max()) < classes:
                    raise InputError(f"labels must be from 0 to {classes - 1}, the classes of the model.")
                loss = F.cross_entropy(logits, wanted.to(logits.device), reduction="sum")
                found = torch.autograd.grad(loss, [gates[name] for name in layers])
            for name, gradient in zip(layers, found, strict=True):
                totals[name] += gradient.flatten(1).abs().sum(0).double().cpu()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    _check_finite({name: bool(total.isfinite().all()) for name, total in totals.items()})
    return {name: total / count for name, total in totals.items()}


def _check_finite(finite: dict[str, bool]) -> None:
    for name, holds in finite.items():
        if not holds:
            raise InputError(
                f"The heads of {name} cannot be scored: its outputs contain NaN or infinity. Check weights and images."
            )


def _choose(scores: dict[str, Tensor], keep: float) -> dict[str, list[int]]:
    """Indices of the heads that stay in each layer: the best one of each layer, then the best of all others."""
    ranked = []
    kept = {}
    for name, values in scores.items():
        best, *others = values.argsort(descending=True, stable=True).tolist()
        kept[name] = [best]
        ranked += [(-float(values[head]), name, head) for head in others]
    room = round(keep * sum(map(len, scores.values()))) - len(kept)
    for _, name, head in sorted(ranked, key=lambda entry: entry[0])[: max(room, 0)]:
        kept[name].append(head)
    return {name: sorted(heads) for name, heads in kept.items()}


def _layers(model: nn.Module) -> dict[str, Any]:
    """Attention layers whose heads can be pruned."""
    known = {n: m for n, m in model.named_modules() if isinstance(m, (Attention, MinimalAttention))}
    if not known:
        raise InputError(f"{type(model).__name__} has no timm Attention or MinimalAttention whose heads can be pruned.")
    for name, layer in known.items():
        mixer = getattr(layer, "mixer", None)
        own = mixer is not None and not isinstance(mixer, MixtureOfHeadsMixer) and any(True for _ in mixer.parameters())
        tied = isinstance(layer, MinimalAttention) and (layer.values != "projected" or layer.triangle is not None)
        if own or tied or not isinstance(getattr(layer, "norm", nn.Identity()), nn.Identity):
            raise InputError(f"The heads of {name} share parameters or a norm and cannot be pruned.")
    return known


def _heads(layer: Any) -> int:
    return int(layer.num_heads)


def _cut(layer: Any, kept: list[int]) -> None:
    """Keep only some heads of a layer."""
    heads = _heads(layer)
    if len(kept) == heads:
        return
    index = torch.tensor(kept, device=layer.proj.weight.device)
    widths = layer.widths if isinstance(layer, MinimalAttention) else [layer.attn_dim] * 3
    starts = [sum(widths[:number]) for number in range(3)]
    rows = torch.cat([start + _rows(index, width // heads) for start, width in zip(starts, widths) if width])
    _select(layer.qkv, rows, 0)
    _select(layer.proj, _rows(index, layer.proj.in_features // heads), 1)
    if isinstance(layer, MinimalAttention):
        layer.widths = [width // heads * len(kept) for width in widths]
    else:
        if layer.gate is not None:
            _select(layer.gate, _rows(index, layer.head_dim), 0)
        layer.attn_dim = layer.head_dim * len(kept)
    layer.num_heads = len(kept)
    mixer = getattr(layer, "mixer", None)
    if mixer is not None:
        _cut_mixer(mixer, kept)


def _rows(index: Tensor, width: int) -> Tensor:
    """Indices of the rows that belong to heads, each `width` rows wide."""
    return (index[:, None] * width + torch.arange(width, device=index.device)).flatten()


def _select(linear: nn.Linear, index: Tensor, axis: int) -> None:
    """Keep only some rows (axis 0) or columns (axis 1) of a linear layer."""
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, index), requires_grad=trains)
    if axis == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, index), requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _cut_mixer(mixer: Any, kept: list[int]) -> None:
    mixer.num_heads = len(kept)
    if not isinstance(mixer, MixtureOfHeadsMixer):
        return
    shared = [head for head in kept if head < mixer.shared_heads]
    experts = [head - mixer.shared_heads for head in kept if head >= mixer.shared_heads]
    for router, rows in ((mixer.wg_1, shared), (mixer.wg, experts)):
        if router is not None and rows:
            _select(router, torch.tensor(rows, device=router.weight.device), 0)
    mixer.wg_1 = mixer.wg_1 if len(shared) > 1 else None
    mixer.wg = mixer.wg if experts else None
    mixer.wg_0 = mixer.wg_0 if shared and experts else None
    mixer.shared_heads, mixer.routed_heads = len(shared), min(mixer.routed_heads, len(experts))
