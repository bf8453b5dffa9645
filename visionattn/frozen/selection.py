r"""Sparse attention in a frozen model: feature error and k-NN accuracy against multiply-accumulates.

The measurement behind `visionattn inspect --policy`. For every policy, with and without the tail:

    error     |f - f_dense| / |f_dense| over the patch features f of an image, after the last layer
    accuracy  leave-one-out k-NN on the mean of f, each channel standardised, cosine, 20 neighbours
    macs      counted from the operations that would run: selection included, multiplications by constants not

The controls `strided` and `random` are always measured: a policy that does not beat them has no benefit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.cost import count_macs
from visionattn.errors import InputError, shorten
from visionattn.frozen.calls import Call, observing
from visionattn.frozen.plan import PLANS, Masses, Plan, features_of, layer_masses, plan_of
from visionattn.frozen.policies import POLICIES, Policy
from visionattn.frozen.using import UnderPolicy, using
from visionattn.probe.statistics import wilson_interval

__all__ = ["ALL", "CONTROLS", "best_plan", "check_policies", "knn_correct", "measure_policies"]

CONTROLS = ("strided", "random")
ALL = tuple(dict.fromkeys([*POLICIES, *PLANS]))
BOUNDS = ("mass",)  # cost dense attention
PLANNING_IMAGES = 8
NEIGHBOURS, TEMPERATURE = 20, 0.07


def measure_policies(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None = None,
    policies: str | Sequence[str] = "all",
    budgets: Sequence[float] = (0.125,),
    *,
    layers: str | Sequence[str] = "*",
    query_tile: int = 8,
    key_tile: int = 4,
    tails: Sequence[bool] = (False, True),
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Compare policies at equal budgets; the controls `strided` and `random` are always included.

    Args:
        model: A frozen model in evaluation mode; its `forward_features` is run if it has one.
        images: One batch (B, C, H, W), or batches of one size. Settings that policies measure (refresh layers, paths,
            budgets of heads) are measured on the first 8 images.
        labels: Class of each image, int64 (n,), for k-NN accuracy; None: accuracy is not measured.
        policies: Names in `ALL`, or "all".
        budgets: Shares of all keys that a query reads, in (0, 1].
        layers: Pattern of layer names, or several.
        query_tile: Side of the tiles of queries that share a selection.
        key_tile: Side of the key tiles; must divide `query_tile`.
        tails: Whether each tile that is not selected takes part as one pooled key; both are measured by default.
        progress: Called with a line of text before each row.

    Returns:
        Rows with the entries `policy`, `tail`, `budget`, `macs` (of the model, for one image), `attention`
        (multiply-accumulates of attention and selection, as a share of those of dense attention, in the layers with a
        grid), `error` (mean over images), `error_low`, `error_high` (95 % interval), `accuracy`, `accuracy_low`,
        `accuracy_high` (95 %; None without labels) and `plan` (a `Plan`; None in the first row, which is "dense").

    Raises:
        InputError: A budget is outside (0, 1], a policy does not exist, there are no images, the number of labels
            differs from that of images, or no layer was reached.
    """
    names = check_policies(policies, budgets)
    batches = [images] if isinstance(images, Tensor) else list(images)
    count = sum(len(batch) for batch in batches)
    if not count or (labels is not None and len(labels) != count):
        given = 0 if labels is None else len(labels)
        raise InputError(f"Images, and as many labels, are required; got {count} and {given}.")
    tell = progress or (lambda line: None)
    tell("dense")
    dense, (products, dense_macs) = _features(model, batches), _dense_macs(model, batches[0], layers)
    rows = [_row("dense", False, 1.0, dense, dense, labels, None) | {"macs": dense_macs, "attention": 1.0}]
    masses = layer_masses(model, _first(batches, PLANNING_IMAGES), query_tile, key_tile, layers)
    for budget in budgets:
        for name in names:
            for tail in tails if name != "tail_only" else [tail for tail in tails if tail]:
                tell(f"{name}{', tail' * tail}, budget {budget:g}")
                settings = {"budget": budget, "tail": tail, "query_tile": query_tile, "key_tile": key_tile}
                rows.append(_measure(model, batches, dense, labels, name, settings, masses, layers))
                macs = count_macs(UnderPolicy(model, rows[-1]["plan"], layers), tuple(batches[0].shape[1:]))
                rows[-1] |= {"macs": macs, "attention": 1 - (dense_macs - macs) / products}
    return rows


def check_policies(policies: str | Sequence[str], budgets: Sequence[float]) -> list[str]:
    """Names of the policies, the controls first.

    Raises:
        InputError: A policy does not exist, or a budget is outside (0, 1].
    """
    for budget in budgets:
        Policy(budget)
    if not budgets:
        raise InputError("budget must be one or more numbers in (0, 1]; got none.")
    given = list(ALL) if policies == "all" else [policies] if isinstance(policies, str) else list(policies)
    unknown = [name for name in given if name not in ALL]
    if unknown or not given:
        raise InputError(f"policy must be 'all' or some of {', '.join(ALL)}; got {shorten(unknown or 'none')}.")
    return list(dict.fromkeys([*CONTROLS, *given]))


def best_plan(rows: Sequence[dict[str, Any]]) -> Plan:
    """The plan with the lowest error among those whose attention costs at most 1.25 times the budget.

    If there is none, among those that cost as much as the cheapest row. The plan may be that of a control: then
    selection by content has no benefit.
    """
    candidates = [row for row in rows if row["plan"] is not None and row["policy"] not in BOUNDS]
    cheapest = min(row["attention"] for row in candidates)
    fitting = [row for row in candidates if row["attention"] <= max(1.25 * row["budget"], cheapest)]
    return min(fitting, key=lambda row: row["error"])["plan"]


def knn_correct(vectors: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Whether leave-one-out k-NN predicts the class of an image: (n, D), (n,) -> bool (n,).

    Channels are standardised, neighbours are found by cosine, and votes are weighted by exp(cosine / 0.07).
    """
    vectors = vectors.double()
    vectors = F.normalize((vectors - vectors.mean(0)) / vectors.std(0).clamp(min=1e-12), dim=1)
    near = (vectors @ vectors.T).fill_diagonal_(-torch.inf).topk(min(k, len(vectors) - 1), dim=1)
    votes = torch.zeros(len(vectors), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
    return votes.argmax(1) == labels


def _measure(
    model: nn.Module,
    batches: list[Tensor],
    dense: Tensor,
    labels: Tensor | None,
    name: str,
    settings: dict[str, Any],
    masses: Masses,
    layers: str | Sequence[str],
) -> dict[str, Any]:
    plan = plan_of(model, masses, name, settings)
    with using(model, plan, layers):
        features = _features(model, batches)
    return _row(name, settings["tail"], settings["budget"], features, dense, labels, plan)


def _row(
    policy: str, tail: bool, budget: float, features: Tensor, dense: Tensor, labels: Tensor | None, plan: Plan | None
) -> dict[str, Any]:
    errors = ((features - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).tolist()
    mean = statistics.fmean(errors)
    half = 1.96 * statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else float("nan")
    row: dict[str, Any] = {"policy": policy, "tail": tail, "budget": budget, "macs": 0, "attention": 0.0}
    row |= {"error": mean, "error_low": mean - half, "error_high": mean + half}
    row |= {"accuracy": None, "accuracy_low": None, "accuracy_high": None}
    if labels is not None:
        correct = knn_correct(features.mean(1), labels)
        interval = wilson_interval(int(correct.sum()), len(correct))
        row |= {"accuracy": float(correct.double().mean()), "accuracy_low": interval.low}
        row |= {"accuracy_high": interval.high}
    return row | {"plan": plan}


def _features(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Patch features of all images, (n, N, C)."""
    found = []
    for batch in batches:
        with torch.no_grad():
            tokens = features_of(model, batch)
        if tokens.ndim == 3:
            tokens = tokens[:, getattr(model, "num_prefix_tokens", 0) :]
        elif tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2) if tokens.shape[1] > tokens.shape[3] else tokens.flatten(1, 2)
        else:
            tokens = tokens.unsqueeze(1)
        found.append(tokens.float().cpu())
    return torch.cat(found)


def _dense_macs(model: nn.Module, images: Tensor, layers: str | Sequence[str]) -> tuple[int, int]:
    """Multiply-accumulates per image: of the products in attention layers with a grid, and of the whole model."""
    products = 0

    def count(call: Call) -> None:
        nonlocal products
        if call.grid is not None and call.bias is None:
            products += call.q.shape[1:3].numel() * call.k.shape[2] * (call.q.shape[3] + call.v.shape[3])

    with torch.no_grad(), observing(model, count, layers):
        features_of(model, images[:1])
    return products, count_macs(model, tuple(images.shape[1:]))


def _first(batches: list[Tensor], count: int) -> list[Tensor]:
    """The first images of batches."""
    found = []
    for batch in batches:
        found.append(batch[:count])
        count -= len(found[-1])
        if count <= 0:
            break
    return found
