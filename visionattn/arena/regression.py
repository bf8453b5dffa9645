r"""In-context linear regression: can a mixer estimate a slope from examples in its input?

    x_l ~ N(0, I_5),   beta ~ N(0, I_5 / 5),   y_l = beta . x_l + noise of variance 0.1

`PAIRS` random cells of a grid contain [x_l; y_l], and one contains [x_q; 0]. The network linear - one mixer - linear
predicts y_q at the query. Its mean squared error is compared with anchors, which are computed from the same data:

    ridge                    x_q . (X^T X + 0.5 I)^-1 X^T y                      the optimum (0.5 is 0.1 times 5)
    gradient descent         eta / L sum_l y_l x_l . x_q                         one step, the best eta
    debiased                 eta / L sum_l y_l (x_l - mean x) . x_q              what two softmax heads learn
    one head                 m sum_l y_l softmax_l(c x_l . x_q)                  the best m and c

Source: "In-context linear regression demystified", arXiv 2503.12734. Deviations: the examples are on a grid, so that
windows see some of them; the mixer has `DIM` channels.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionattn.arena.nets import create_mixer, train
from visionattn.arena.plan import Found, Plan

__all__ = ["ANCHORS", "Examples", "RegressionNet", "anchors", "draw", "gradient_descent", "one_head", "ridge", "run"]

FEATURES, NOISE = 5, 0.1
PAIRS, GRID = 40, (6, 7)
MORE_PAIRS, LARGER = 80, (9, 9)
DIM, HEADS = 16, 2
BATCH = 64
ANCHORS = ("ridge", "gradient descent", "debiased gradient descent", "one head")


class Examples(NamedTuple):
    """Pairs and a query of each sequence: x (B, L, 5), y (B, L), query (B, 5), and its value (B,)."""

    x: Tensor
    y: Tensor
    query: Tensor
    value: Tensor


def draw(batch: int, pairs: int, seed: int, dtype: torch.dtype = torch.float32) -> Examples:
    """Draw sequences, each with its own slope."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    beta = normal(batch, FEATURES, 1) / FEATURES**0.5
    x, noise = normal(batch, pairs + 1, FEATURES), normal(batch, pairs + 1)
    y = (x @ beta)[..., 0] + NOISE**0.5 * noise
    return Examples(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def ridge(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """Posterior mean, (B,), for the variances given in the module."""
    gram = x.mT @ x + NOISE * FEATURES * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    slope = torch.linalg.solve(gram, x.mT @ y[..., None])[..., 0]
    return (slope * query).sum(dim=1)


def gradient_descent(x: Tensor, y: Tensor, query: Tensor, debiased: bool = False) -> Tensor:
    """One step of size 1 from a slope of zero, (B,); debiased: the mean of the examples is subtracted."""
    x = x - x.mean(dim=1, keepdim=True) if debiased else x
    return (y * (x @ query[..., None])[..., 0]).mean(dim=1)


def one_head(x: Tensor, y: Tensor, query: Tensor, c: float) -> Tensor:
    """Softmax average of y with logits c x . query, (B,)."""
    return ((c * (x @ query[..., None])[..., 0]).softmax(dim=1) * y).sum(dim=1)


def _error(estimate: Tensor, value: Tensor, scaled: bool = False) -> float:
    """Mean squared error; of the best multiple of the estimate if `scaled`."""
    if scaled:
        estimate = estimate * ((estimate * value).mean() / estimate.square().mean())
    return (estimate - value).square().mean().item()


@cache
def anchors(sequences: int, pairs: int = PAIRS) -> dict[str, float]:
    """Mean squared errors of `ANCHORS`, on the first of the sequences on which mixers are tested."""
    x, y, query, value = draw(sequences, pairs, 1)
    heads = (_error(one_head(x, y, query, c / 20), value, scaled=True) for c in range(2, 31))
    return {
        "ridge": _error(ridge(x, y, query), value),
        "gradient descent": _error(gradient_descent(x, y, query), value, scaled=True),
        "debiased gradient descent": _error(gradient_descent(x, y, query, debiased=True), value, scaled=True),
        "one head": min(heads),
    }


class RegressionNet(nn.Module):
    """Linear - mixer - linear, read at the query.

    Shape:
        tokens (B, H W, 6), cells of the queries (B,) -> estimates (B,).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before = nn.Linear(FEATURES + 1, DIM)
        self.mixer = create_mixer(name, DIM, HEADS, GRID)
        self.after = nn.Linear(DIM, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int], cells: Tensor) -> Tensor:
        """Estimates at the cells of queries."""
        y = self.mixer(self.before(tokens), grid)
        return self.after(y[torch.arange(len(y), device=y.device), cells])[:, 0]


def on_grid(examples: Examples, grid: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, H W, 6) with the examples in random cells, and cells of the queries (B,)."""
    x, y, query, _ = examples
    batch, pairs, features = x.shape
    order = torch.rand(batch, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    tokens = torch.zeros(batch, grid[0] * grid[1], features + 1)
    rows = torch.arange(batch)[:, None]
    tokens[rows, order[:, :pairs]] = torch.cat([x, y[..., None]], dim=2)
    tokens[rows[:, 0], order[:, pairs]] = torch.cat([query, torch.zeros(batch, 1)], dim=1)
    return tokens, order[:, pairs]


def run(name: str, seed: int, plan: Plan, device: torch.device) -> list[Found]:
    """Train a mixer, and return its mean squared error with as many pairs as in training and with more.

    Args:
        name: Name in `MIXERS`.
        seed: Seed of parameters and batches; tests are the same for all seeds.
        plan: Sizes of the run.
        device: Device of training and tests.
    """
    torch.manual_seed(seed)
    net = RegressionNet(name).to(device)

    def errors(batch: int, pairs: int, grid: tuple[int, int], number: int) -> Tensor:
        examples = draw(batch, pairs, number)
        tokens, cells = on_grid(examples, grid, number)
        return net(tokens.to(device), grid, cells.to(device)) - examples.value.to(device)

    first = 10**6 * (seed + 1)
    train(net, lambda step: errors(BATCH, PAIRS, GRID, first + step).square().mean(), plan.regression_steps)
    with torch.inference_mode():
        return [
            Found("regression error", f"L={pairs}", errors(plan.sequences, pairs, grid, 1).square().mean().item())
            for pairs, grid in ((PAIRS, GRID), (MORE_PAIRS, LARGER))
        ]
