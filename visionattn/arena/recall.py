r"""Multi-query associative recall on grids: can a mixer find the value that belongs to a key?

In an H x W grid, K random cells contain pairs and K other random cells contain queries; the rest is empty. At each
query cell the network predicts which of `SYMBOLS` values belongs to the pair with the same key; chance is 1 / SYMBOLS.

- Continuous: a pair is one cell [key; value], a query is [key; 0], with vectors from two fixed tables. The network is
  linear - one mixer - linear; the prediction is the value with the largest dot product.
- Discrete: a pair is one cell with two symbols, a query is a cell with the key; learned embeddings are added. The
  network is norm - mixer - linear, and the prediction is one of SYMBOLS classes.
- Cross: the pairs are the context of the mixer, and x contains the queries.

Networks are trained with K from `TRAINED_PAIRS`. They are tested with more pairs, with every query at one Chebyshev
distance from its pair (a step in that curve is the reach of a window), and on a larger grid than in training.

Source: Zoology, arXiv 2312.04927, and its authors' continuous form. Deviations: theirs uses sequences, and tables of
8,192 symbols. In their discrete form the value of a key is the next token, which requires two layers: with the value in
the next cell, two layers of softmax attention were at chance after 1,200 steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.arena.nets import create_mixer, train
from visionattn.arena.plan import Found, Plan
from visionattn.errors import InputError
from visionattn.mixers import find_mixer

__all__ = ["ContinuousNet", "DiscreteNet", "Tables", "accuracy", "place", "run", "symbols", "tokens"]

GRID, LARGER = (8, 8), (16, 16)
SYMBOLS, WIDTH = 64, 32
DIM, HEADS = 64, 2
TRAINED_PAIRS, TESTED_PAIRS, LARGER_PAIRS, COMPARED_PAIRS = (4, 8, 16), (4, 16, 32), (16, 64), 16
NEAR_PAIRS = 4  # number of pairs in tests with a fixed distance
BATCH = 32


class Tables(NamedTuple):
    """Vectors of keys and of values, each (SYMBOLS, WIDTH), with entries of variance 1."""

    keys: Tensor
    values: Tensor


def draw_tables(device: torch.device) -> Tables:
    """The same tables in every run: vectors of equal length in random directions."""
    drawn = torch.randn(2, SYMBOLS, WIDTH, generator=torch.Generator().manual_seed(0))
    keys, values = (F.normalize(drawn, dim=-1) * WIDTH**0.5).to(device)
    return Tables(keys, values)


def place(
    batch: int, pairs: int, grid: tuple[int, int], generator: torch.Generator, distance: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the cells of pairs and of their queries, all different.

    Args:
        batch: Number B of grids.
        pairs: Number K of pairs in each.
        grid: (H, W).
        generator: Random number generator.
        distance: Chebyshev distance between a pair and its query; None: any.

    Returns:
        Two tensors (B, K) with indices of cells, row by row.

    Raises:
        InputError: The grid has too few cells, or none at that distance.
    """
    cells = grid[0] * grid[1]
    if pairs < 1 or 2 * pairs > cells:
        raise InputError(f"A grid of {grid[0]} x {grid[1]} is too small for {pairs} pairs and as many queries.")
    if distance is None:
        drawn = torch.rand(batch, cells, generator=generator).argsort(dim=1)
        return drawn[:, :pairs], drawn[:, pairs : 2 * pairs]
    if not 1 <= distance < max(grid):
        raise InputError(
            f"distance must be from 1 to {max(grid) - 1} on a grid of {grid[0]} x {grid[1]}; got {distance}."
        )
    rows, columns = torch.arange(cells) // grid[1], torch.arange(cells) % grid[1]
    apart = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    near = (apart == distance).float()
    free = torch.ones(batch, cells)
    found: list[Tensor] = []
    for _ in range(pairs):
        query = torch.multinomial(free * (free @ near > 0), 1, generator=generator)
        free.scatter_(1, query, 0)
        pair = torch.multinomial(free * near[query[:, 0]], 1, generator=generator)
        free.scatter_(1, pair, 0)
        found += [pair, query]
    return torch.cat(found[::2], dim=1), torch.cat(found[1::2], dim=1)


def symbols(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Random symbols, all different in a row: (B, count) from 0 to SYMBOLS - 1."""
    return torch.rand(batch, SYMBOLS, generator=generator).argsort(dim=1)[:, :count]


def tokens(
    tables: Tables, batch: int, pairs: int, grid: tuple[int, int], seed: int, distance: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grids of the continuous form.

    Returns:
        Tokens (B, H W, 2 WIDTH), cells of the pairs and of the queries (B, K), and the target values (B, K).
    """
    generator = torch.Generator().manual_seed(seed)
    device = tables.keys.device
    pair_cells, query_cells = (cells.to(device) for cells in place(batch, pairs, grid, generator, distance))
    keys, values = (symbols(batch, pairs, generator).to(device) for _ in range(2))
    asked = tables.keys[keys]
    x = torch.zeros(batch, grid[0] * grid[1], 2 * WIDTH, device=device)
    rows = torch.arange(batch, device=device)[:, None]
    x[rows, pair_cells] = torch.cat([asked, tables.values[values]], dim=2)
    x[rows, query_cells] = torch.cat([asked, torch.zeros_like(asked)], dim=2)
    return x, pair_cells, query_cells, values


class ContinuousNet(nn.Module):
    """Linear - mixer - linear, with scores from the table of values.

    Shape:
        x (B, H W, 2 WIDTH), cells (B, K), context (B, M, 2 WIDTH) or None -> scores (B, K, SYMBOLS).
    """

    def __init__(self, name: str, tables: Tables) -> None:
        super().__init__()
        self.tables = tables
        self.before = nn.Linear(2 * WIDTH, DIM)
        self.mixer = create_mixer(name, DIM, HEADS, GRID)
        self.after = nn.Linear(DIM, WIDTH)

    def forward(self, x: Tensor, grid: tuple[int, int], cells: Tensor, context: Tensor | None = None) -> Tensor:
        """Scores of all values at the cells of queries."""
        if context is not None:
            context = self.before(context)
        y = self.mixer(self.before(x), grid, context)
        return self.after(gather(y, cells)) @ self.tables.values.T


class DiscreteNet(nn.Module):
    """Learned embeddings, norm - mixer - linear.

    Shape:
        symbols (B, H W, 2), cells (B, K) -> scores (B, K, SYMBOLS).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.keys = nn.Embedding(SYMBOLS + 1, DIM)
        self.values = nn.Embedding(SYMBOLS + 1, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.mixer = create_mixer(name, DIM, HEADS, GRID)
        self.after = nn.Linear(DIM, SYMBOLS)

    def forward(self, x: Tensor, grid: tuple[int, int], cells: Tensor) -> Tensor:
        """Scores of all values at the cells of queries."""
        y = self.norm(self.keys(x[..., 0]) + self.values(x[..., 1]))
        return self.after(gather(self.mixer(y, grid), cells))


def gather(y: Tensor, cells: Tensor) -> Tensor:
    """(B, N, C), (B, K) -> (B, K, C)."""
    return y.gather(1, cells[..., None].expand(-1, -1, y.shape[2]))


def symbol_cells(batch: int, pairs: int, grid: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grids of the discrete form: each cell has a key and a value, numbered from 1; 0 means none.

    Returns:
        Symbols (B, H W, 2), cells of the queries (B, K), and the target values (B, K), numbered from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    pair_cells, query_cells = place(batch, pairs, grid, generator)
    keys, values = symbols(batch, pairs, generator), symbols(batch, pairs, generator)
    x = torch.zeros(batch, grid[0] * grid[1], 2, dtype=torch.long)
    x[..., 0].scatter_(1, pair_cells, 1 + keys).scatter_(1, query_cells, 1 + keys)
    x[..., 1].scatter_(1, pair_cells, 1 + values)
    return x, query_cells, values


def accuracy(scores: Tensor, values: Tensor) -> float:
    """Share of the queries whose largest score is that of the target value: (B, K, symbols), (B, K)."""
    return (scores.argmax(dim=-1) == values).float().mean().item()


def run(name: str, seed: int, plan: Plan, device: torch.device) -> list[Found]:
    """Train a mixer on all forms that it supports, and test it.

    Args:
        name: Name in `MIXERS`.
        seed: Seed of parameters and batches; tests are the same for all seeds.
        plan: Sizes of the run.
        device: Device of training and tests.
    """
    found = _continuous(name, seed, plan, device) + _discrete(name, seed, plan, device)
    return found + (_cross(name, seed, plan, device) if "cross" in find_mixer(name).supports else [])


def _loss(scores: Tensor, values: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), values.flatten())


def _continuous(name: str, seed: int, plan: Plan, device: torch.device) -> list[Found]:
    torch.manual_seed(seed)
    tables = draw_tables(device)
    net = ContinuousNet(name, tables).to(device)

    def loss(step: int) -> Tensor:
        pairs = TRAINED_PAIRS[step % len(TRAINED_PAIRS)]
        x, _, cells, values = tokens(tables, BATCH, pairs, GRID, 10**6 * (seed + 1) + step)
        return _loss(net(x, GRID, cells), values)

    @torch.inference_mode()
    def test(pairs: int, grid: tuple[int, int], distance: int | None = None) -> float:
        x, _, cells, values = tokens(tables, plan.tests, pairs, grid, 1, distance)
        return accuracy(net(x, grid, cells), values)

    train(net, loss, plan.recall_steps)
    found = [Found("recall", f"K={pairs}", test(pairs, GRID)) for pairs in TESTED_PAIRS]
    found += [Found("recall by distance", f"r={r}", test(NEAR_PAIRS, GRID, r)) for r in range(1, GRID[0])]
    return found + [Found("recall on a larger grid", f"K={pairs}", test(pairs, LARGER)) for pairs in LARGER_PAIRS]


def _discrete(name: str, seed: int, plan: Plan, device: torch.device) -> list[Found]:
    torch.manual_seed(seed)
    net = DiscreteNet(name).to(device)

    def scores(batch: int, pairs: int, number: int) -> tuple[Tensor, Tensor]:
        x, cells, values = (tensor.to(device) for tensor in symbol_cells(batch, pairs, GRID, number))
        return net(x, GRID, cells), values

    def loss(step: int) -> Tensor:
        return _loss(*scores(BATCH, TRAINED_PAIRS[step % len(TRAINED_PAIRS)], 10**6 * (seed + 1) + step))

    train(net, loss, plan.recall_steps)
    with torch.inference_mode():
        return [Found("discrete recall", f"K={COMPARED_PAIRS}", accuracy(*scores(plan.tests, COMPARED_PAIRS, 1)))]


def _cross(name: str, seed: int, plan: Plan, device: torch.device) -> list[Found]:
    torch.manual_seed(seed)
    tables = draw_tables(device)
    net = ContinuousNet(name, tables).to(device)

    def scores(batch: int, pairs: int, number: int) -> tuple[Tensor, Tensor]:
        x, pair_cells, cells, values = tokens(tables, batch, pairs, GRID, number)
        context = gather(x, pair_cells)
        return net(x.scatter(1, pair_cells[..., None].expand_as(context), 0.0), GRID, cells, context), values

    def loss(step: int) -> Tensor:
        return _loss(*scores(BATCH, TRAINED_PAIRS[step % len(TRAINED_PAIRS)], 10**6 * (seed + 1) + step))

    train(net, loss, plan.recall_steps)
    with torch.inference_mode():
        return [Found("cross recall", f"K={COMPARED_PAIRS}", accuracy(*scores(plan.tests, COMPARED_PAIRS, 1)))]
