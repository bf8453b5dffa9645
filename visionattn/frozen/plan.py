r"""Plans: the policy of a frozen model, with settings measured on it, in a file that `using` and `export` read.

With M_l the attention that a layer's query tiles give to key tiles (the mass), and S_l the K tiles of the largest mass:

    overlap   O_ij = min over heads of the mean over images and query tiles of |S_i and S_j| / K,  i <= j
    path      each layer j reads the selection of a layer i(j) <= j; i(j) is j, a refresh layer, or i(j - 1). Among all
              paths with at most c changes of the source, the one with the largest minimum of O_i(j),j; ties are broken
              by the largest sum
    heads     K of a head: the number of tiles that hold a share of its mass. The share is the same for all heads, and
              the largest for which the mean K over heads and layers fits the budget

The path is that of RALS, the published successor of HyLRA: sensitive layers, the ceil(0.09 L) that need the most tiles
for 90 % of their mass, stay dense, and the others have c = ceil(0.273 L) changes. Refresh layers as in DELTA are the
first layer and those whose masses differ most from the previous layer's (1 - cosine).

Sources: HyLRA and RALS; DELTA; TCA-Attention (budgets per head only: its online score is not published).

Deviation: RALS finds paths by comparing (smallest overlap, sum) step by step, which can miss the best sum. Here the
largest minimum overlap is found first, then the best sum among the paths that reach it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import atomic_path, read_json, violation
from visionattn.frozen.batches import batches_of, run_on
from visionattn.frozen.calls import Call, observing
from visionattn.frozen.policies import POLICIES, Policy
from visionattn.frozen.tiles import Grid, tile_mass

__all__ = [
    "PLANS",
    "Masses",
    "Plan",
    "head_budgets",
    "layer_masses",
    "make_plan",
    "overlap_matrix",
    "plan_of",
    "plan_reuse",
    "refresh_layers",
    "tiles_for_mass",
]

# Names that are not policies, or policies whose settings are measured.
PLANS = ("reuse", "reuse_tree", "planned", "heads", "tree_pooled")

SENSITIVE, CHANGED = 0.09, 0.273  # shares of layers: 1 - s, and s rho, of RALS with s = 0.91 and rho = 0.3
FORMAT = 1


class Masses(NamedTuple):
    """Attention of query tiles to key tiles in a model's layers.

    Attributes:
        names: Names of the layers.
        numbers: Their indices, in the order in which layers call attention.
        grid: (H, W), the same in all layers.
        by_layer: Masses of each layer, (n, h, query tiles, key tiles).
    """

    names: list[str]
    numbers: list[int]
    grid: Grid
    by_layer: list[Tensor]


@dataclass(frozen=True)
class Plan:
    """A policy for one model.

    Attributes:
        policy: Name in `POLICIES`.
        settings: Arguments of the policy.
        layers: For each attention layer of the measured model, the shapes of its parameters and the mean of their
            magnitudes, by which the model is recognised.
    """

    policy: str
    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]

    def make(self) -> Policy:
        """Make the policy.

        Raises:
            InputError: The policy does not exist or does not accept the settings.
        """
        try:
            return POLICIES[self.policy](**self.settings)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"Policy {shorten(self.policy)!r} cannot be made with the settings of the plan: {error}."
            ) from error

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` if the model is not the one that was measured; its dtype may differ."""
        modules = dict(model.named_modules())
        lacking = [name for name in self.layers if name not in modules]
        if lacking:
            raise InputError(
                f"The plan belongs to another model: {type(model).__name__} has no layer {shorten(lacking[0])!r}. Make "
                "a plan for this model."
            )
        for name, expected in self.layers.items():
            found = _identity(modules[name])
            same = found["shapes"] == expected["shapes"] and math.isclose(
                found["magnitude"], expected["magnitude"], rel_tol=0.02
            )
            if not same:
                raise InputError(
                    f"The plan belongs to another model: the weights of {name} differ. Make a plan for this model."
                )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            StorageError: The file could not be written.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"visionattn_plan": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            DataError: The file is missing or damaged, or has another format.
        """
        content = read_json(path, {"visionattn_plan": int, "policy": str, "settings": dict, "layers": dict})
        if content["visionattn_plan"] != FORMAT:
            raise DataError(f"{shorten(path)} is a plan of format {content['visionattn_plan']}; {FORMAT} is required.")
        if not content["layers"]:
            raise DataError(f"{shorten(path)} is damaged: it names no layer of the measured model.")
        for name, found in content["layers"].items():
            if wrong := violation(found, {"shapes": list, "magnitude": (float, int)}, f"layers.{shorten(name)}."):
                raise DataError(f"{shorten(path)} is damaged: {wrong}.")
        plan = cls(content["policy"], content["settings"], content["layers"])
        try:
            plan.make()
        except (InputError, TypeError, ValueError) as error:
            raise DataError(f"{shorten(path)} is damaged: {shorten(error)}") from error
        return plan


def _identity(module: nn.Module) -> dict[str, Any]:
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    total = sum(p.detach().double().abs().sum().item() for p in parameters)
    return {"shapes": [list(p.shape) for p in parameters], "magnitude": total / max(count, 1)}


def make_plan(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    policy: str = "planned",
    *,
    budget: float = 0.125,
    tail: bool = True,
    query_tile: int = 8,
    key_tile: int = 4,
    layers: str | Sequence[str] = "*",
) -> Plan:
    """Measure a frozen model and make a plan for it.

    Args:
        model: A model in evaluation mode.
        images: A batch (B, C, H, W), or batches of one size: some tens of images of the kind the model will see.
        policy: Name in `POLICIES`; or `"planned"`, reuse along the best path; `"reuse"`, reuse with as many refresh
            layers, chosen as in DELTA; `"reuse_tree"`, the same without dense attention; `"tree_pooled"`, `tree` with
            `pooled`.
        budget: See `Policy`.
        tail: See `Policy`.
        query_tile: See `Policy`.
        key_tile: See `Policy`.
        layers: Pattern of layer names, or several.

    Raises:
        InputError: A setting is not possible, no layer was reached, or the grids of the layers differ.
    """
    settings: dict[str, Any] = {"budget": budget, "tail": tail, "query_tile": query_tile, "key_tile": key_tile}
    masses = layer_masses(model, images, query_tile, key_tile, layers)
    return plan_of(model, masses, policy, settings)


def plan_of(model: nn.Module, masses: Masses, policy: str, settings: dict[str, Any]) -> Plan:
    """Make a plan from masses that were measured before; see `make_plan`.

    Raises:
        InputError: The policy does not exist, or a setting is not possible.
    """
    name = {"reuse_tree": "reuse", "planned": "reuse", "tree_pooled": "tree"}.get(policy, policy)
    if name not in POLICIES:
        raise InputError(
            f"policy must be one of {', '.join(dict.fromkeys([*POLICIES, *PLANS]))}; got {shorten(policy)!r}."
        )
    keep = POLICIES[name](**settings).keep(masses.grid)
    own: dict[str, Any] = {}
    modules = dict(model.named_modules())
    if policy == "planned":
        needed = torch.stack([tiles_for_mass(mass).mean() for mass in masses.by_layer])
        count = len(masses.names)
        sensitive = needed.topk(math.ceil(SENSITIVE * count)).indices.tolist()
        path = plan_reuse(overlap_matrix(masses.by_layer, keep), math.ceil(CHANGED * count), sensitive)
        own["sources"] = _numbered([layer if source < 0 else source for layer, source in enumerate(path)], masses)
    elif name == "reuse":
        count = 1 + math.ceil(CHANGED * len(masses.names)) + math.ceil(SENSITIVE * len(masses.names))
        refreshed = refresh_layers(masses.by_layer, min(count, len(masses.names)))
        sources = [max(r for r in refreshed if r <= layer) for layer in range(len(masses.names))]
        own["sources"] = _numbered(sources, masses)
    elif policy == "heads":
        counts = dict(zip(masses.numbers, head_budgets(masses.by_layer, keep), strict=True))
        own["counts"] = [counts.get(number, []) for number in range(max(masses.numbers) + 1)]
    if policy == "reuse_tree":
        own["select"] = "tree"
    elif policy == "tree_pooled":
        own["pooled"] = True
    return Plan(name, {**settings, **own}, {name: _identity(modules[name]) for name in masses.names})


def _numbered(sources: list[int], masses: Masses) -> list[int]:
    """Sources by layer index; layers that were not measured read their own selection."""
    by_number = dict(zip(masses.numbers, (masses.numbers[source] for source in sources), strict=True))
    return [by_number.get(number, number) for number in range(max(masses.numbers) + 1)]


def layer_masses(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    query_tile: int = 8,
    key_tile: int = 4,
    layers: str | Sequence[str] = "*",
) -> Masses:
    """Measure the attention between tiles in every layer that has a grid and no bias.

    Raises:
        InputError: No such layer was reached, or grids differ between layers or batches.
    """
    found: dict[str, list[Tensor]] = {}
    numbers: dict[str, int] = {}
    grids: set[Grid] = set()

    def measure(call: Call) -> None:
        if call.grid is None or call.bias is not None:
            return
        mass = tile_mass(call.q * call.scale, call.k, call.grid, query_tile, key_tile, call.prefix)
        if not bool(mass.isfinite().all()):
            raise InputError(f"The attention of {call.layer} contains NaN or infinity. Check weights and images.")
        found.setdefault(call.layer, []).append(mass.float().cpu())
        numbers[call.layer] = call.number
        grids.add(call.grid)

    with torch.no_grad(), observing(model, measure, layers):
        for batch in batches_of(images):
            run_on(lambda shown: features_of(model, shown), batch, model)
    if len(grids) != 1:
        sizes = ", ".join(f"{height} x {width}" for height, width in sorted(grids)) or "none"
        raise InputError(
            f"A plan requires layers and batches with one grid of tokens; {type(model).__name__} has {sizes}."
        )
    return Masses(list(found), list(numbers.values()), grids.pop(), [torch.cat(parts) for parts in found.values()])


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Output of `forward_features` if the model has it (tokens (B, N, C) in timm's ViT), otherwise of the model."""
    return getattr(model, "forward_features", model)(images)


def tiles_for_mass(mass: Tensor, share: float = 0.9) -> Tensor:
    """Number of tiles that hold a share of the mass: (n, h, nq, nk) -> mean over images and query tiles, (h,)."""
    falling = mass.sort(-1, descending=True).values
    held = (falling.cumsum(-1) - falling) / falling.sum(-1, keepdim=True)  # before each tile
    return (held < share).sum(-1).double().mean(dim=(0, 2))


def overlap_matrix(masses: Sequence[Tensor], keep: int) -> Tensor:
    """Overlap of the selections of layers (see the module).

    Args:
        masses: Masses of each layer, (n, h, nq, nk), with equal numbers of heads.
        keep: Number K of tiles that a query tile reads.

    Returns:
        (L, L) float64; O_ij above and on the diagonal, 0 below it.
    """
    chosen = [
        torch.zeros_like(mass, dtype=torch.bool).scatter(-1, mass.topk(keep, -1).indices, True) for mass in masses
    ]
    overlap = torch.zeros(len(masses), len(masses), dtype=torch.float64)
    for i, first in enumerate(chosen):
        for j in range(i, len(chosen)):
            overlap[i, j] = ((first & chosen[j]).sum(-1).double() / keep).mean(dim=(0, 2)).min()
    return overlap


def plan_reuse(overlap: Tensor, changes: int, sensitive: Sequence[int] = ()) -> list[int]:
    """Find the best path (see the module).

    Args:
        overlap: (L, L), O_ij of source i and reader j, i <= j.
        changes: Number of layers after the first that may select again, not counting sensitive layers.
        sensitive: Layers that stay dense and are not used as sources.

    Returns:
        Source of each layer; -1 if it selects by itself or stays dense.

    Raises:
        InputError: `changes` is below 0.
    """
    if changes < 0:
        raise InputError(f"changes must be at least 0; got {changes}.")
    layers = [layer for layer in range(len(overlap)) if layer not in set(sensitive)]
    path = [-1] * len(overlap)
    if not layers:
        return path
    values = overlap[layers][:, layers].tolist()
    sources: list[int] = []
    # The largest minimum overlap that a path can have is one of the values.
    for least in sorted({value for i, row in enumerate(values) for value in row[i:]}, reverse=True):
        sources = _best_path(values, changes, least)
        if sources:
            break
    for reader, source in enumerate(sources):
        if source != reader:
            path[layers[reader]] = layers[source]
    return path


def _best_path(values: list[list[float]], changes: int, least: float) -> list[int]:
    """Sources along the path with the largest sum, among paths without a value below `least`; empty if none exists."""
    best: dict[tuple[int, int], tuple[float, list[int]]] = {}  # by source and changes
    for reader in range(len(values)):
        new: dict[tuple[int, int], tuple[float, list[int]]] = {}
        if reader == 0:
            options: list[tuple[tuple[int, int], float, list[int]]] = [((0, 0), 0.0, [])]
        else:
            options = [(key, *state) for key, state in best.items()]
            options += [((reader, used + 1), total, path) for (_, used), (total, path) in best.items()]
        for (source, used), total, path in options:
            value = values[source][reader]
            if used <= changes and value >= least and total + value > new.get((source, used), (-1.0, []))[0]:
                new[source, used] = (total + value, [*path, source])
        best = new
    return max(best.values(), default=(0.0, []))[1]


def refresh_layers(masses: Sequence[Tensor], count: int) -> list[int]:
    """The first layer, and those whose masses differ most from the previous layer's: `count` indices, sorted.

    Args:
        masses: Masses of each layer, (n, h, nq, nk), with equal numbers of heads.
        count: Number of layers, from 1 to all.
    """
    alike = [nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in itertools.pairwise(masses)]
    order = sorted(range(1, len(masses)), key=lambda layer: float(alike[layer - 1]))
    return sorted([0, *order[: count - 1]])


def head_budgets(masses: Sequence[Tensor], keep: int) -> list[list[int]]:
    """Number of tiles of every head in every layer: equal shares of mass, and on average at most `keep` tiles.

    Args:
        masses: Masses of each layer, (n, h, nq, nk).
        keep: Largest mean number of tiles.

    Returns:
        For each layer, K of each head, from 1 to all tiles.
    """
    low, high, counts = 0.0, 1.0, [[1] * mass.shape[1] for mass in masses]
    for _ in range(20):
        share = (low + high) / 2
        found = [tiles_for_mass(mass, share).round().clamp(1, mass.shape[-1]).int().tolist() for mass in masses]
        flat = [count for own in found for count in own]
        if sum(flat) <= keep * len(flat):
            low, counts = share, found
        else:
            high = share
    return counts
