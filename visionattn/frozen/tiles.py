r"""Tiles of a grid, and attention to a few of them: selected tiles exactly, the others pooled.

A grid of H x W tokens is cut into query tiles of T x T and key tiles of t x t, both row by row; tiles at the right and
bottom may have fewer tokens. A query tile reads the K key tiles in `index` token by token. With the tail, it reads
every other tile u as one key, the mean of its n_u keys, with the mean of its values:

    l_ij = s q_i . k_j                         j a prefix token or a token of a tile in the index of i's tile
    l_iu = s q_i . mean(k_u) + log n_u         u any other tile, with the tail
    y_i  = softmax(l_i) applied to [v_j, mean(v_u)]

Limits: with all tiles in the index the result is softmax attention, and so it is with any index if keys are constant
within tiles. If all keys are equal, y is the mean of the values. Prefix tokens as queries always read all keys.

Why the tail: if attention is diffuse, softmax over a selection is biased by the keys it omits, and even the tiles of
the largest mass are worse than a regular grid of keys (see docs).

Cost: 2 N (P + K t^2 + H W / t^2) C multiply-accumulates, and the memory of K t^2 gathered keys per query tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError, shorten

__all__ = ["Grid", "Tiling", "gather_tiles", "near_far_attention", "pool", "tile_mass", "tiling"]

Grid = tuple[int, int]


class Tiling(NamedTuple):
    """Partition of a grid into n tiles of t x t tokens.

    Attributes:
        shape: Number of tiles down and across.
        table: Token at each position of a tile, (n, t^2) int64; positions outside the grid repeat a border token.
        inside: Whether a position is inside the grid, (n, t^2) bool.
        place: Index of each token among the n t^2 positions, (H W,) int64.
    """

    shape: Grid
    table: Tensor
    inside: Tensor
    place: Tensor

    @property
    def tokens(self) -> Tensor:
        """Number of tokens of each tile, (n,) int64."""
        return self.inside.sum(1)

    @property
    def centres(self) -> Tensor:
        """Centre (y, x) of each tile, taken as complete, in units of half a token, int64 (n, 2)."""
        side = round(self.table.shape[1] ** 0.5)
        y, x = torch.meshgrid(*(torch.arange(n, device=self.table.device) for n in self.shape), indexing="ij")
        return torch.stack([y.flatten(), x.flatten()], 1) * 2 * side + side - 1


def tiling(grid: Grid, side: int, device: torch.device | str = "cpu") -> Tiling:
    """Cut a grid into tiles of `side` x `side` tokens."""
    (height, width), count = grid, (-(-grid[0] // side), -(-grid[1] // side))
    y, x = torch.meshgrid(*(torch.arange(n * side, device=device) for n in count), indexing="ij")

    def cut(table: Tensor) -> Tensor:
        return (
            table.unflatten(1, (count[1], side)).unflatten(0, (count[0], side)).transpose(1, 2).flatten(2).flatten(0, 1)
        )

    table = cut(y.clamp(max=height - 1) * width + x.clamp(max=width - 1))
    inside = cut((y < height) & (x < width))
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    place = ((y // side * count[1] + x // side) * side + y % side) * side + x % side
    return Tiling(count, table, inside, place.flatten())


def gather_tiles(x: Tensor, tiles: Tiling) -> Tensor:
    """Tokens of the grid by tile: (B, h, H W, D) -> (B, h, n, t^2, D)."""
    return x.index_select(2, tiles.table.flatten()).unflatten(2, tiles.table.shape)


def pool(x: Tensor, tiles: Tiling) -> Tensor:
    """Mean of the tokens of each tile: (B, h, n, t^2, D) -> (B, h, n, D)."""
    weight = tiles.inside.to(x.dtype)
    return (x * (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)).sum(3)


def tile_mass(q: Tensor, k: Tensor, grid: Grid, query_tile: int = 8, key_tile: int = 4, prefix: int = 0) -> Tensor:
    """Attention that query tiles give to key tiles: the mean over a tile's queries of the sum over a tile's keys.

    Args:
        q: Queries (B, h, P + H W, D), scaled.
        k: Keys (B, h, P + H W, D).
        grid: (H, W).
        query_tile: Side T of the query tiles.
        key_tile: Side t of the key tiles.
        prefix: Number P of prefix tokens, which take part as keys.

    Returns:
        (B, h, query tiles, key tiles); a row sums to 1 minus the attention on the prefix tokens.
    """
    queries, keys = tiling(grid, query_tile, q.device), tiling(grid, key_tile, q.device)
    shares = queries.inside.to(q.dtype) / queries.tokens.to(q.dtype).unsqueeze(1)
    inside = keys.inside.to(q.dtype)
    k = k.transpose(-1, -2).contiguous()
    rows = []
    for tile, share in zip(queries.table, shares, strict=True):  # never materialises the N x N matrix
        weights = share @ (q.index_select(2, prefix + tile) @ k).softmax(-1)  # (B, h, P + H W)
        rows.append((weights[..., prefix:][..., keys.table] * inside).sum(-1))
    return torch.stack(rows, dim=2)


def near_far_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    index: Tensor | Sequence[Tensor],
    *,
    query_tile: int = 8,
    key_tile: int = 4,
    tail: bool = True,
    prefix: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Attention to selected tiles (equations: see the module).

    Args:
        q: Queries (B, h, P + H W, D).
        k: Keys (B, h, P + H W, D).
        v: Values (B, h, P + H W, E).
        grid: (H, W).
        index: Key tiles, int64 (B or 1, h or 1, query tiles or 1, K), each at most once per query tile. With 1 query
            tile all queries read the same tiles. A sequence has one such index per head, each with its own K.
        query_tile: Side T of the query tiles.
        key_tile: Side t of the key tiles.
        tail: Whether tiles that are not selected take part as pooled keys.
        prefix: Number P of prefix tokens.
        scale: Factor s of the logits.

    Returns:
        (B, h, P + H W, E).

    Raises:
        InputError: The index has another shape or type, or is empty and there is neither tail nor prefix; on a CPU,
            also if it contains a tile that does not exist, or one twice.
    """
    if not isinstance(index, Tensor):
        if len(index) != q.shape[1]:
            raise InputError(f"The policy returns indices for {len(index)} heads; the layer has {q.shape[1]}.")
        heads = []
        for head, own in enumerate(index):
            part = [x[:, head : head + 1] for x in (q, k, v)]
            heads.append(
                near_far_attention(
                    part[0],
                    part[1],
                    part[2],
                    grid,
                    own,
                    query_tile=query_tile,
                    key_tile=key_tile,
                    tail=tail,
                    prefix=prefix,
                    scale=scale,
                )
            )
        return torch.cat(heads, dim=1)
    q = q * scale
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, scale=1.0) if prefix else None
    prefix_k, prefix_v = k[:, :, :prefix], v[:, :, :prefix]
    q, k, v = (x[:, :, prefix:] for x in (q, k, v))
    keys = tiling(grid, key_tile, q.device)
    queries = tiling(grid, query_tile, q.device)
    _check_index(index, q, queries, keys, tail or bool(prefix))
    shared = index.shape[2] == 1
    q = q.unsqueeze(2) if shared else gather_tiles(q, queries)  # (B, h, nq, T^2, D)

    tiles_k, tiles_v = gather_tiles(k, keys), gather_tiles(v, keys)
    logits, values = [], []
    if prefix:
        logits.append(q @ prefix_k.unsqueeze(2).transpose(-1, -2))
        values.append(prefix_v.unsqueeze(2))
    if index.shape[3]:
        near = q @ _select(tiles_k, index).transpose(-1, -2)  # (B, h, nq, T^2, K t^2)
        if grid[0] % key_tile or grid[1] % key_tile:
            near = near.masked_fill(~keys.inside[index].flatten(-2).unsqueeze(-2), -torch.inf)
        logits.append(near)
        values.append(_select(tiles_v, index))
    if tail:
        far = q @ pool(tiles_k, keys).unsqueeze(2).transpose(-1, -2) + keys.tokens.to(q.dtype).log()
        logits.append(far.masked_fill(_named(index, len(keys.table)).unsqueeze(-2), -torch.inf))
        values.append(pool(tiles_v, keys).unsqueeze(2))
    weights = torch.cat(logits, dim=-1).softmax(-1).split([part.shape[-1] for part in logits], dim=-1)
    y = reduce(torch.add, (weight @ value for weight, value in zip(weights, values, strict=True)))
    y = y.squeeze(2) if shared else y.flatten(2, 3).index_select(2, queries.place)
    return y if first is None else torch.cat([first, y], dim=2)


def _select(tiles: Tensor, index: Tensor) -> Tensor:
    """Tokens of the tiles in an index: (B, h, n, t^2, D), (B', h', nq, K) -> (B, h, nq, K t^2, D)."""
    batch, heads, count = tiles.shape[:3]
    shape = index.shape[2:]
    if index.shape[:2] == (1, 1):
        return tiles.index_select(2, index.flatten()).unflatten(2, shape).flatten(3, 4)
    start = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * count
    rows = tiles.flatten(3).flatten(0, 2).index_select(0, (index + start).flatten())  # contiguous copies of tiles
    return rows.view(batch, heads, shape[0], shape[1] * tiles.shape[3], tiles.shape[4])


def _named(index: Tensor, tiles: int) -> Tensor:
    """Whether a tile is in an index: (B', h', nq, K) -> (B', h', nq, tiles) bool."""
    named = torch.zeros(*index.shape[:3], tiles, dtype=torch.bool, device=index.device)
    return named.scatter(3, index, True)


def _check_index(index: Tensor, q: Tensor, queries: Tiling, keys: Tiling, others: bool) -> None:
    """Check an index. Its values are checked on the CPU only: elsewhere this would synchronise with the device."""
    allowed = (1, q.shape[0]), (1, q.shape[1]), (1, len(queries.table)), range(len(keys.table) + 1)
    if index.dtype != torch.int64 or index.ndim != 4 or any(n not in a for n, a in zip(index.shape, allowed)):
        raise InputError(
            f"The index of a policy must be int64 of shape (batch or 1, {q.shape[1]} or 1, {len(queries.table)} or 1, "
            f"0 to {len(keys.table)}); got {str(index.dtype).removeprefix('torch.')} {shorten(tuple(index.shape))}."
        )
    if not index.shape[3] and not others:
        raise InputError("The policy selects no tile, and there is no tail or prefix token to attend to.")
    if type(index) is not Tensor or index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    count = len(keys.table)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise InputError(f"The policy selects tiles {low} to {high}; the grid has tiles 0 to {count - 1}.")
    if int(_named(index, count).sum(-1).min()) < index.shape[3]:
        raise InputError("The policy selects a tile twice for the same queries; select each tile at most once.")
