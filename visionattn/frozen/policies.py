r"""Selection policies: which key tiles does a query tile read?

    index = policy(q, k, grid, layer, state)

    q, k    (B, h, H W, D), queries scaled, without prefix tokens
    grid    (H, W)
    layer   index of the layer, in the order in which layers call attention
    state   a dict that is empty at the start of a forward pass
    index   int64 (B or 1, h or 1, query tiles or 1, K) of key tiles, or one such index per head, or None: dense

A function with these arguments is a policy; `visionattn.frozen.tiles` computes attention from the index. The classes
here turn a budget into K: a query reads `budget` H W keys, of which the tail takes one per key tile.

    strided, random   controls: a regular grid of keys, and random keys; whole tiles with the tail
    tail_only         control: no tile is read, all tiles are pooled
    window            the nearest tiles (FreeSwim, arXiv 2511.14712, by tiles)
    pooled            the largest products of mean query and mean key
    tree              coarse to fine (HiP, arXiv 2406.09827): key tiles in Morton order in K groups; groups are halved
                      and the K best halves kept until each is one tile. A half is scored by the largest q.k of any
                      query with the keys of its first tile, which costs 0.75 of dense scores at 4,096 tokens; with
                      `pooled=True` by the mean query and its mean key, which costs nearly nothing
    mass              the tiles of the largest dense attention: costs dense scores; a bound for what selection can reach
    reuse             selection of an earlier layer (DELTA). Refresh layers that select by mass compute dense attention
    heads             `pooled` with a separate K for every head and layer (budgets as in TCA)

Deviations from DELTA: selection is per head and per tile of queries, since maxima over heads were worse in our
measurement, and there is no recency window, which images do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visionattn.errors import InputError, shorten
from visionattn.frozen.tiles import Grid, gather_tiles, pool, tile_mass, tiling

__all__ = [
    "POLICIES",
    "HeadBudgets",
    "Index",
    "Mass",
    "Policy",
    "Pooled",
    "Random",
    "Reuse",
    "Strided",
    "TailOnly",
    "Tree",
    "Window",
    "first_tile_score",
    "morton_order",
    "tree_search",
]

Index = Tensor | Sequence[Tensor]
State = dict[Any, Any]


LARGEST_TILE = 1024


class Policy:
    """Base class of policies: budget and tiles.

    Args:
        budget: Share of the grid's keys that a query reads, in (0, 1].
        tail: Whether each tile that is not selected takes part as one pooled key.
        query_tile: Side of the tiles of queries that share a selection.
        key_tile: Side of the key tiles; must divide `query_tile`.

    Raises:
        InputError: The budget is outside (0, 1], or a side is not possible.
    """

    name: ClassVar[str]

    def __init__(self, budget: float = 0.125, tail: bool = True, query_tile: int = 8, key_tile: int = 4) -> None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
            raise InputError(f"budget must be in (0, 1]; got {shorten(budget)}.")
        sides = query_tile, key_tile
        if any(type(side) is not int or not 1 <= side <= LARGEST_TILE for side in sides) or query_tile % key_tile:
            raise InputError(
                f"query_tile must be divisible by key_tile, and both must be integers from 1 to {LARGEST_TILE}; got "
                f"{shorten(query_tile)} and {shorten(key_tile)}."
            )
        if not isinstance(tail, bool):
            raise InputError(f"tail must be true or false; got {shorten(tail)}.")
        self.budget, self.tail, self.query_tile, self.key_tile = float(budget), tail, query_tile, key_tile

    def keep(self, grid: Grid) -> int:
        """Number K of key tiles that fit the budget, at least 1; all tiles if the budget is 1."""
        (height, width), side = grid, self.key_tile
        tiles = -(-height // side) * -(-width // side)
        if self.budget == 1:
            return tiles
        keys = self.budget * height * width - (tiles if self.tail else 0)
        return min(max(round(keys / side**2), 1), tiles)

    def __call__(self, q: Tensor, k: Tensor, grid: Grid, layer: int, state: State) -> Index | None:
        """Select key tiles (see the module)."""
        raise NotImplementedError

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class _Control(Policy):
    """Selection that does not depend on content: single keys without the tail, whole tiles with it."""

    def __init__(self, budget: float = 0.125, tail: bool = True, query_tile: int = 8, key_tile: int = 4) -> None:
        super().__init__(budget, tail, query_tile, key_tile if tail else 1)


class Strided(_Control):
    """A regular grid of keys, the same for all queries."""

    name = "strided"

    def __call__(self, q, k, grid, layer, state):
        """Select (1, 1, 1, K), K at most the budget's."""
        down, across = tiling(grid, self.key_tile, q.device).shape
        keep = self.keep(grid)
        rows = min(max(round((keep * down / across) ** 0.5), 1), down, keep)
        columns = min(keep // rows, across)
        y = (torch.arange(rows, device=q.device) * 2 + 1) * down // (2 * rows)
        x = (torch.arange(columns, device=q.device) * 2 + 1) * across // (2 * columns)
        return (y[:, None] * across + x).view(1, 1, 1, -1)


class Random(_Control):
    """Random keys: different for every query tile and layer, but the same in every run."""

    name = "random"

    def __call__(self, q, k, grid, layer, state):
        """Select (1, 1, nq, K)."""
        queries = len(tiling(grid, self.query_tile, q.device).table)
        keys = len(tiling(grid, self.key_tile, q.device).table)
        # A hash of the indices instead of a generator, which cannot be traced.
        number = torch.arange(queries * keys, device=q.device)
        noise = number + (layer + 1) * 7_919
        for _ in range(3):
            noise = (noise * noise + 48_271 * noise + 11) % (2**31 - 1)
        return _largest(noise.view(1, 1, queries, keys), self.keep(grid))


class TailOnly(Policy):
    """No tile is read: every tile is one pooled key, and the budget has no effect."""

    name = "tail_only"

    def __call__(self, q, k, grid, layer, state):
        """Select (1, 1, 1, 0)."""
        return torch.zeros(1, 1, 1, 0, dtype=torch.int64, device=q.device)


class Window(Policy):
    """The nearest tiles by the larger of the vertical and the horizontal distance: a window, shifted at borders."""

    name = "window"

    def __call__(self, q, k, grid, layer, state):
        """Select (1, 1, nq, K)."""
        queries, keys = (tiling(grid, side, q.device) for side in (self.query_tile, self.key_tile))
        apart = (queries.centres[:, None] - keys.centres).abs()  # (nq, nk, 2)
        # Ties are broken by the sum of both distances.
        distance = apart.amax(-1) * 4 * sum(grid) + apart.sum(-1)
        return _largest(-distance[None, None], self.keep(grid))


def _largest(scores: Tensor, keep: int) -> Tensor:
    """Tiles with the largest int64 scores; of equal scores the first, since runtimes order ties differently."""
    count = scores.shape[-1]
    return (scores * count - torch.arange(count, device=scores.device)).topk(keep, dim=-1).indices


class Pooled(Policy):
    """The tiles with the largest product of mean query and mean key."""

    name = "pooled"

    def __call__(self, q, k, grid, layer, state):
        """Select (B, h, nq, K), the best first."""
        queries, keys = (tiling(grid, side, q.device) for side in (self.query_tile, self.key_tile))
        scores = pool(gather_tiles(q, queries), queries) @ pool(gather_tiles(k, keys), keys).transpose(-1, -2)
        return scores.topk(self.keep(grid), dim=-1).indices


class Mass(Policy):
    """The tiles of the largest dense attention, which is computed for the selection: a bound, not a saving."""

    name = "mass"

    def __call__(self, q, k, grid, layer, state):
        """Select (B, h, nq, K), the best first."""
        return tile_mass(q, k, grid, self.query_tile, self.key_tile).topk(self.keep(grid), dim=-1).indices


class Tree(Policy):
    """Coarse to fine over key tiles in Morton order (see the module).

    Args:
        budget: See `Policy`.
        tail: See `Policy`.
        query_tile: See `Policy`.
        key_tile: See `Policy`.
        pooled: Score a half by its mean key and the mean query, instead of all queries and the keys of its first tile.
    """

    name = "tree"

    def __init__(
        self, budget: float = 0.125, tail: bool = True, query_tile: int = 8, key_tile: int = 4, pooled: bool = False
    ) -> None:
        super().__init__(budget, tail, query_tile, key_tile)
        self.pooled = pooled

    def __call__(self, q, k, grid, layer, state):
        """Select (B, h, nq, K), sorted by position in Morton order."""
        queries, keys = (tiling(grid, side, q.device) for side in (self.query_tile, self.key_tile))
        order = morton_order(keys.shape, q.device)
        q, k = gather_tiles(q, queries), gather_tiles(k, keys).index_select(2, order)
        if self.pooled:
            score = _mean_score(pool(q, queries), k, keys.inside[order].to(k.dtype), keys.tokens[order])
        else:
            score = first_tile_score(q, k)
        return order[tree_search(score, q.shape[:3], k.shape[2], self.keep(grid), q.device)]


def morton_order(count: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Indices of a grid's tiles, numbered row by row, in the order of a Z-curve: (n,) int64."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in count), indexing="ij")
    code = torch.zeros_like(y)
    for bit in range(max(count).bit_length()):
        code = code + ((y // 2**bit % 2) * 2 + x // 2**bit % 2) * 4**bit
    return code.flatten().argsort()


def first_tile_score(q: Tensor, k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Score groups of tiles by the largest product of any query with the keys of the group's first tile.

    Args:
        q: Queries by tile (B, h, nq, T^2, D).
        k: Keys by tile (B, h, nk, t^2, D).
    """

    def score(start: Tensor, size: Tensor) -> Tensor:
        first = start.flatten(2).unsqueeze(-1).expand(-1, -1, -1, k.shape[3] * k.shape[4])
        keys = k.flatten(3).gather(2, first).view(*start.shape[:3], -1, k.shape[4])
        return (q @ keys.transpose(-1, -2)).amax(3).unflatten(-1, (-1, k.shape[3])).amax(-1)

    return score


def _mean_score(q: Tensor, k: Tensor, inside: Tensor, tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Score groups of tiles by the product of the mean query (B, h, nq, D) with the mean key of the group."""
    sums = (k * inside.unsqueeze(-1)).sum(3)
    products = q @ sums.transpose(-1, -2)  # (B, h, nq, nk): their sum over a group is q . (sum of its keys)
    products = torch.nn.functional.pad(products.cumsum(-1), (1, 0))
    counts = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))

    def score(start: Tensor, size: Tensor) -> Tensor:
        end = start + size
        return (products.gather(-1, end) - products.gather(-1, start)) / (counts[end] - counts[start]).clamp(min=1)

    return score


def tree_search(
    score: Callable[[Tensor, Tensor], Tensor],
    batch: Sequence[int],
    count: int,
    keep: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Halve `keep` groups of consecutive tiles, keeping the best halves, until each is one tile.

    Args:
        score: Returns scores of groups from their first tile and their size, both (*batch, n) int64.
        batch: Shape of the independent searches.
        count: Number of tiles.
        keep: Number of groups, and of tiles to select.
        device: Device of the result.

    Returns:
        Selected tiles, sorted, int64 (*batch, keep).
    """
    edges = torch.arange(keep + 1, device=device) * count // keep
    start = edges[:-1].expand(*batch, keep)
    size = edges.diff().expand(*batch, keep)
    rounds = max((-(-count // keep) - 1).bit_length(), 0)
    for _ in range(rounds):
        half = size // 2
        start, size = torch.cat([start, start + half], -1), torch.cat([half, size - half], -1)
        best = score(start, size).masked_fill(size == 0, -torch.inf).topk(keep, dim=-1).indices
        start, size = start.gather(-1, best), size.gather(-1, best)
    return start.sort(-1).values


class Reuse(Policy):
    """Read the tiles that an earlier layer selected.

    Args:
        budget: See `Policy`.
        tail: See `Policy`.
        query_tile: See `Policy`.
        key_tile: See `Policy`.
        sources: For each layer, the index of the layer whose selection it reads; its own index in a refresh layer.
            Layers beyond the end, and those whose source did not run, refresh.
        select: How refresh layers select: `"mass"`, with dense attention there, or `"tree"`.
    """

    name = "reuse"

    def __init__(
        self,
        budget: float = 0.125,
        tail: bool = True,
        query_tile: int = 8,
        key_tile: int = 4,
        sources: Sequence[int] = (),
        select: str = "mass",
    ) -> None:
        super().__init__(budget, tail, query_tile, key_tile)
        if select not in ("mass", "tree"):
            raise InputError(f"select must be one of 'mass', 'tree'; got {shorten(select)!r}.")
        self.sources, self.select = list(sources), select
        if any(type(source) is not int or not 0 <= source <= layer for layer, source in enumerate(self.sources)):
            raise InputError(
                f"sources must be indices of layers, none greater than its own position; got {shorten(sources)}."
            )

    def __call__(self, q, k, grid, layer, state):
        """Select (B, h, nq, K), or None in a refresh layer with dense attention."""
        source = self.sources[layer] if layer < len(self.sources) else layer
        if source != layer and ("reuse", source) in state:
            return state["reuse", source]
        kind = Mass if self.select == "mass" else Tree
        index = kind(self.budget, self.tail, self.query_tile, self.key_tile)(q, k, grid, layer, state)
        state["reuse", layer] = index
        return None if self.select == "mass" else index


class HeadBudgets(Pooled):
    """`Pooled` with a separate number of tiles for every head of every layer.

    Args:
        budget: See `Policy`.
        tail: See `Policy`.
        query_tile: See `Policy`.
        key_tile: See `Policy`.
        counts: For each layer, K of each of its heads; layers beyond the end use the budget.
    """

    name = "heads"

    def __init__(
        self,
        budget: float = 0.125,
        tail: bool = True,
        query_tile: int = 8,
        key_tile: int = 4,
        counts: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(budget, tail, query_tile, key_tile)
        self.counts = [list(own) for own in counts]
        if any(type(count) is not int or not 1 <= count < 2**31 for own in self.counts for count in own):
            raise InputError(f"counts must be numbers of tiles of at least 1; got {shorten(counts)}.")

    def __call__(self, q, k, grid, layer, state):
        """Select (B, 1, nq, K of the head) for every head."""
        if layer >= len(self.counts) or not self.counts[layer]:
            return super().__call__(q, k, grid, layer, state)
        counts = self.counts[layer]
        if len(counts) != q.shape[1]:
            raise InputError(f"counts has {len(counts)} heads for layer {layer}, which has {q.shape[1]} heads.")
        queries, keys = (tiling(grid, side, q.device) for side in (self.query_tile, self.key_tile))
        scores = pool(gather_tiles(q, queries), queries) @ pool(gather_tiles(k, keys), keys).transpose(-1, -2)
        best = scores.topk(min(max(counts), scores.shape[-1]), dim=-1).indices
        return [best[:, head : head + 1, :, :count] for head, count in enumerate(counts)]


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Strided, Random, TailOnly, Window, Pooled, Tree, Mass, Reuse, HeadBudgets)
}
