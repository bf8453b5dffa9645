r"""Per-image routers: choose the attention budget of each image.

Labels are made offline (the recipe of VISOR): every image runs under every budget, and its label is the cheapest budget
whose score is at least 99 % of the dense model's. A linear map of u, the mean query of the first layer, is trained on
the labels by cross-entropy, with each channel standardised:

    p(budget | image) = softmax(W (u - mean) / deviation + b)

A router must beat the best fixed budget at equal mean multiply-accumulates, which may mix two budgets over random
subsets of the images: `compare_router` reports both, and the labels themselves as an upper bound. Evaluate on images
that the router was not trained on.

`FluxRouter` is the router of Flux Attention, which decides between dense and sparse in each layer:

    u = mean of the queries of the first and last S tokens, over all heads        (B, D)
    logits = W_5 silu(W_4 silu(W_3 (W_2 silu(W_1 u))))                            D -> 8D -> 2D -> 4D -> D -> 2, biases

with index 1 for dense. It has 36 D^2 + 17 D + 2 parameters, as many as an attention layer of ViT-Tiny at D = 64. Its
training by Gumbel softmax needs the labels of a task and is not implemented.

Sources: VISOR (labels), Flux Attention (router).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import InputError
from visionattn.frozen.calls import Call, observing
from visionattn.frozen.plan import features_of
from visionattn.frozen.policies import Policy
from visionattn.frozen.using import attend, using

__all__ = ["FluxRouter", "LinearRouter", "Routed", "compare_router", "offline_labels", "route_scores", "train_router"]


class FluxRouter(nn.Module):
    """The router of Flux Attention (equations: see the module).

    Args:
        head_dim: Width D of a head.
        pool_size: Number S of tokens at each end.

    Shape:
        Queries (B, N, heads, D) -> logits (B, 2), index 1 for dense.
    """

    def __init__(self, head_dim: int, pool_size: int = 100) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.cls_feat_extractor = nn.Sequential(
            nn.Linear(head_dim, 8 * head_dim), nn.SiLU(), nn.Linear(8 * head_dim, 2 * head_dim)
        )
        self.cls_router_head_agnostic = nn.Sequential(
            nn.Linear(2 * head_dim, 4 * head_dim),
            nn.SiLU(),
            nn.Linear(4 * head_dim, head_dim),
            nn.SiLU(),
            nn.Linear(head_dim, 2),
        )

    def forward(self, q: Tensor) -> Tensor:
        """Logits."""
        ends = torch.cat([q[:, : self.pool_size], q[:, -self.pool_size :]], dim=1)
        return self.cls_router_head_agnostic(self.cls_feat_extractor(ends.mean(dim=(1, 2))))


class LinearRouter(nn.Module):
    """A linear map of standardised features.

    Args:
        mean: Mean of each channel, (D,).
        deviation: Standard deviation of each channel, (D,).
        choices: Number of budgets.

    Shape:
        (B, D) -> logits (B, choices).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, choices: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), choices)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        return self.linear((features - self.mean) / self.deviation)


def mean_query(call: Call) -> Tensor:
    """Mean query of the grid's tokens, heads concatenated: (B, h D)."""
    return call.q[:, :, call.prefix :].mean(2).flatten(1)


def route_scores(
    model: nn.Module, images: Tensor | Iterable[Tensor], policies: Sequence[Policy | None]
) -> tuple[Tensor, Tensor]:
    """Run all images under every policy.

    Args:
        model: A model in evaluation mode.
        images: A batch (B, C, H, W), or batches.
        policies: Policies in order of increasing cost; None is dense.

    Returns:
        Scores (n, policies), the cosine between the mean token under the policy and with dense attention, and features
        (n, h D), the mean query of the first layer.
    """
    scores, features = [], []
    with torch.no_grad():
        for batch in [images] if isinstance(images, Tensor) else images:
            calls: list[Call] = []
            with observing(model, calls.append):
                dense = _vectors(model, batch)
            row = []
            for policy in policies:
                if policy is None:
                    row.append(torch.ones(len(batch)))
                    continue
                with using(model, policy):
                    row.append(F.cosine_similarity(_vectors(model, batch), dense).cpu())
            scores.append(torch.stack(row, dim=1))
            features.append(mean_query(calls[0]).float().cpu())
    return torch.cat(scores), torch.cat(features)


def _vectors(model: nn.Module, images: Tensor) -> Tensor:
    tokens = features_of(model, images)
    return tokens if tokens.ndim == 2 else tokens.flatten(1, -2).mean(1)


def offline_labels(scores: Tensor, dense: Tensor | float = 1.0, share: float = 0.99) -> Tensor:
    """Index of the cheapest budget of each image that keeps a share of its dense score; the last one if none does.

    Args:
        scores: (n, budgets), in order of increasing cost.
        dense: Score of the dense model, one value or (n,).
        share: Share of the dense score that must be kept, in (0, 1].

    Returns:
        int64 (n,).

    Raises:
        InputError: `share` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share must be in (0, 1]; got {share}.")
    least = share * torch.as_tensor(dense, dtype=scores.dtype).reshape(-1, 1)
    kept = scores >= least
    kept[:, -1] = True
    return kept.int().argmax(dim=1)


def train_router(
    features: Tensor, labels: Tensor, choices: int, *, steps: int = 200, decay: float = 0.01
) -> LinearRouter:
    """Fit a linear router by L-BFGS, starting from zero: the result does not depend on a seed.

    Args:
        features: (n, D).
        labels: Labels from `offline_labels`, int64 (n,).
        choices: Number of budgets.
        steps: Maximum number of iterations.
        decay: Factor of the squared weights in the loss.
    """
    features = features.double()
    router = LinearRouter(features.mean(0), features.std(0).clamp(min=1e-12), choices).double()
    optimizer = torch.optim.LBFGS(router.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(router(features), labels) + decay * router.linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return router.float().eval()


def compare_router(scores: Tensor, macs: Sequence[float], choice: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Mean score and cost of a router, compared with its control and its upper bound.

    Args:
        scores: (n, budgets).
        macs: Cost of each budget, in increasing order.
        choice: Budgets that the router chose, int64 (n,).
        labels: Labels from `offline_labels`.

    Returns:
        Rows `router`, `fixed` (the best mixture of fixed budgets for the router's mean cost), `labels` and `fixed at
        the labels' cost`, each with `score` and `macs`.
    """
    costs = torch.tensor(list(macs), dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for name, chosen in (("router", choice), ("labels", labels)):
        cost = costs[chosen].mean().item()
        score = scores.gather(1, chosen[:, None]).double().mean().item()
        fixed = _fixed(scores.double().mean(0), costs, cost)
        control = "fixed" if name == "router" else "fixed at the labels' cost"
        rows += [{"name": name, "score": score, "macs": cost}, {"name": control, "score": fixed, "macs": cost}]
    return rows


def _fixed(scores: Tensor, costs: Tensor, cost: float) -> float:
    """Best mean score of one budget, or of a mixture of two, at a mean cost of at most `cost`."""
    best = float(scores[costs <= cost + 1e-9].max())
    for low in range(len(costs)):
        for high in range(low + 1, len(costs)):
            if costs[low] <= cost < costs[high]:
                share = (cost - costs[low]) / (costs[high] - costs[low])
                best = max(best, float(scores[low] + share * (scores[high] - scores[low])))
    return best


class Routed:
    """A policy that runs each image under the policy that a router chooses for it, in all layers.

    For eager mode only: the routing depends on the images and cannot be traced.

    Args:
        router: Returns logits (B, policies) from the mean query of the first layer (B, h D).
        policies: Policies in order of increasing cost; None is dense.
    """

    def __init__(self, router: nn.Module, policies: Sequence[Policy | None]) -> None:
        self.router, self.policies = router, list(policies)

    def attend(self, call: Call) -> Tensor | None:
        """Attention of a call, with each image under its own policy."""
        if call.grid is None or call.bias is not None:
            return None
        if torch.compiler.is_compiling():
            raise InputError("A routed policy depends on the images and cannot be traced: trace one of its policies.")
        if "choice" not in call.state:
            call.state["choice"] = self.router(mean_query(call).float()).argmax(1)
        choice, found = call.state["choice"], torch.empty(*call.q.shape[:3], call.v.shape[3]).to(call.v)
        for number in choice.unique().tolist():
            rows = (choice == number).nonzero().flatten()
            state = call.state.setdefault(number, {})
            part = call._replace(q=call.q[rows], k=call.k[rows], v=call.v[rows], state=state)
            policy = self.policies[number]
            result = None if policy is None else attend(policy, part)
            if result is None:
                result = F.scaled_dot_product_attention(part.q, part.k, part.v, scale=part.scale)
            found[rows] = result
        return found

    def __call__(self, *args: Any) -> None:
        """Not used: `attend` computes the attention."""
        raise InputError("A routed policy does not select tiles itself; run it with visionattn.frozen.using.")
