r"""Statistics of the attention of each layer, measured through its calls and averaged over images.

effective keys   exp of the entropy of a query's attention
received         attention that a column receives, in units of the uniform share 1 / N; the maximum over an image
class share      share of all attention that goes to the class token
sinks            tokens found by three detectors (see `visionattn.frozen.sinks`): outliers of the attention of the
                 class token (of all tokens if there is none), columns that receive more than 10 times the uniform
                 share, tokens with more than 10 % of their energy in one channel of the block's input
tiles            share of the key tiles that hold 90 % of a query tile's attention
overlap          share of the selected key tiles, an eighth of all, that the best earlier layer selects too; the
                 minimum over heads
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import InputError
from visionattn.frozen.calls import Call, Reached, observing
from visionattn.frozen.plan import features_of, overlap_matrix, tiles_for_mass
from visionattn.frozen.sinks import FACTOR, channel_share, outliers
from visionattn.frozen.tiles import tile_mass

__all__ = ["LayerLook", "Look", "look"]

KEY_TILES = 4, 2, 1  # sides of key tiles; the first that gives at least 16 tiles is used
CHANNEL = 0.1


@dataclass(frozen=True)
class LayerLook:
    """Statistics of one layer; means over images, heads and queries.

    Attributes:
        layer: Name of the attention layer.
        keys: Number of keys N.
        effective_keys: Effective number of keys of a query, 1 to N.
        received: Largest attention received by a column.
        received_by_class: Share of the images in which this column is the class token or another prefix token.
        class_share: Attention on the class token; NaN if there is none.
        outliers: Number of outliers by Tukey's rule.
        received_sinks: Number of tokens that receive more than 10 times the uniform share.
        channel_sinks: Number of tokens with more than 10 % of their energy in one channel; NaN if the block's input is
            not known.
        channel_share: Largest share of a token's energy in one channel, mean over tokens.
        tiles: Share of the key tiles that hold 90 % of the attention.
        overlap: Overlap with the best earlier layer; NaN for the first layer.
    """

    layer: str
    keys: int
    effective_keys: float
    received: float
    received_by_class: float
    class_share: float
    outliers: float
    received_sinks: float
    channel_sinks: float
    channel_share: float
    tiles: float
    overlap: float

    def to_json(self) -> dict[str, Any]:
        """Values for JSON: None instead of NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Look:
    """Statistics of all layers that attend over a grid.

    Attributes:
        layers: Statistics of the layers, in the order of their calls.
        grid: Height and width of the grid of patches.
        has_class: Whether maps are the attention of a class token; otherwise they are received attention.
        maps: Map of each layer, (n, N) over the patches, mean over heads, on the CPU.
        sinks: Outliers of the map of each layer, bool (n, N).
        reached: Layers that were reached, and layers that were not.
    """

    layers: list[LayerLook]
    grid: tuple[int, int]
    has_class: bool
    maps: list[Tensor]
    sinks: list[Tensor]
    reached: Reached


class _Sums:
    """Measurements of one layer: one number or tensor per image."""

    def __init__(self) -> None:
        self.keys = 0
        self.values: dict[str, list[float]] = {}
        self.maps: list[Tensor] = []
        self.masses: list[Tensor] = []

    def add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def mean(self, name: str) -> float:
        found = self.values.get(name, [math.nan])
        return sum(found) / len(found)


def look(model: nn.Module, images: Tensor, progress: Callable[[int], object] | None = None) -> Look:
    """Measure every layer whose tokens are a grid (see the module).

    Args:
        model: A model in evaluation mode.
        images: Normalised images, (n, C, H, W). They are run one by one, and the attention weights of only one head are
            in memory at a time.
        progress: Called with the number of images done so far.

    Raises:
        InputError: No layer with a grid was reached, or grids differ between layers.
    """
    sums: dict[str, _Sums] = {}
    grids: set[tuple[int, int]] = set()
    prefixes: set[int] = set()
    classes = getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)

    def watch(call: Call) -> None:
        if call.grid is not None:
            grids.add(call.grid)
            prefixes.add(call.prefix)
            _measure(call, sums.setdefault(call.layer, _Sums()), classes and call.prefix > 0)

    handles = [_watch_input(module, name, sums) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), observing(model, watch) as reached:
            for number, image in enumerate(images):
                features_of(model, image[None])
                if progress is not None:
                    progress(number + 1)
    finally:
        for handle in handles:
            handle.remove()
    if len(grids) != 1 or len(prefixes) != 1:
        sizes = ", ".join(f"{height} x {width}" for height, width in sorted(grids))
        what = f"layers with grids {sizes}" if sizes else "no layer that attends over a grid of patches"
        raise InputError(
            f"{type(model).__name__} has {what}: inspect requires a transformer with one grid, such as timm's ViT, "
            "whose attention calls scaled_dot_product_attention."
        )
    has_class = bool(classes) and prefixes.pop() > 0
    maps = [torch.stack(one.maps) for one in sums.values()]
    overlaps = _overlaps([torch.cat(one.masses) for one in sums.values()])
    rows = [_row(name, one, has_class, overlap) for (name, one), overlap in zip(sums.items(), overlaps, strict=True)]
    return Look(rows, grids.pop(), has_class, maps, [outliers(found) for found in maps], reached)


def _watch_input(module: nn.Module, name: str, sums: dict[str, _Sums]) -> Any:
    """Register a hook that measures the input of the block around an attention layer, once the layer is known."""

    def note(block: nn.Module, inputs: tuple, output: Any) -> None:
        for layer, found in sums.items():
            if layer.rpartition(".")[0] == name and inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 3:
                shares = channel_share(inputs[0][0].float())
                found.add(channel_share=shares.mean(), channel_sinks=(shares > CHANNEL).sum())

    return module.register_forward_hook(note)


def _measure(call: Call, sums: _Sums, has_class: bool) -> None:
    """Add one image, head by head."""
    count, prefix = call.k.shape[2], call.prefix
    assert call.grid is not None
    received = torch.zeros(count, device=call.q.device)
    first = torch.zeros(count, device=call.q.device)
    heads = call.q.shape[1]
    entropy = 0.0
    for head in range(heads):
        logits = (call.q[0, head].float() @ call.k[0, head].float().T) * call.scale
        if call.bias is not None:
            bias = call.bias.expand(1, heads, count, count)[0, head]
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        weights = logits.softmax(-1)
        entropy += float(torch.special.entr(weights).sum(-1).exp().mean()) / heads
        received += weights.mean(0) / heads
        first += weights[0] / heads
    values = (first if has_class else received)[prefix:].cpu()
    sums.keys = count
    sums.maps.append(values)
    sums.add(
        effective_keys=entropy,
        received=received.max() * count,
        received_by_class=float(received.argmax() < prefix),
        outliers=outliers(values).sum(),
        received_sinks=(received * count > FACTOR).sum(),
    )
    if has_class:
        sums.add(class_share=received[0])
    side = next((side for side in KEY_TILES if math.prod(-(-n // side) for n in call.grid) >= 16), 1)
    mass = tile_mass(call.q * call.scale, call.k, call.grid, 2 * side, side, prefix)
    sums.masses.append(mass.float().cpu())


def _overlaps(masses: list[Tensor]) -> list[float]:
    """Overlap of each layer's selection with the best earlier one; NaN if layers differ in their number of heads."""
    keep = max(1, masses[0].shape[-1] // 8)
    if len({tuple(mass.shape[1:]) for mass in masses}) > 1:
        return [math.nan] * len(masses)
    matrix = overlap_matrix(masses, keep)
    return [math.nan] + [float(matrix[:j, j].max()) for j in range(1, len(masses))]


def _row(name: str, sums: _Sums, has_class: bool, overlap: float) -> LayerLook:
    masses = torch.cat(sums.masses)
    return LayerLook(
        name,
        sums.keys,
        sums.mean("effective_keys"),
        sums.mean("received"),
        sums.mean("received_by_class"),
        sums.mean("class_share") if has_class else math.nan,
        sums.mean("outliers"),
        sums.mean("received_sinks"),
        sums.mean("channel_sinks"),
        sums.mean("channel_share"),
        float(tiles_for_mass(masses).mean()) / masses.shape[-1],
        overlap,
    )
