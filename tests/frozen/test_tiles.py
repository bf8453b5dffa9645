"""Tiles of a grid, and attention to few of them."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.errors import InputError
from visionattn.frozen.tiles import gather_tiles, near_far_attention, pool, tile_mass, tiling

GRIDS = [(16, 8), (7, 10), (3, 2)]


def tensors(grid, prefix=0, batch=2, heads=2, width=4):
    shape = batch, heads, prefix + grid[0] * grid[1], width
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def tiles_of(grid, side):
    """Tokens of each tile, by loops."""
    rows, columns = range(0, grid[0], side), range(0, grid[1], side)
    return [
        [i * grid[1] + j for i in range(y, min(y + side, grid[0])) for j in range(x, min(x + side, grid[1]))]
        for y in rows
        for x in columns
    ]


def by_loops(q, k, v, grid, index, query_tile, key_tile, tail, prefix, scale):
    """The definition, query by query."""
    keys, out = tiles_of(grid, key_tile), torch.empty_like(v)
    index = index.expand(q.shape[0], q.shape[1], len(tiles_of(grid, query_tile)), -1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            out[b, h, :prefix] = (scale * q[b, h, :prefix] @ k[b, h].T).softmax(-1) @ v[b, h]
            for n, queries in enumerate(tiles_of(grid, query_tile)):
                chosen = index[b, h, n].tolist()
                near = list(range(prefix)) + [prefix + token for u in chosen for token in keys[u]]
                far = [[prefix + token for token in keys[u]] for u in range(len(keys)) if tail and u not in chosen]
                own_k = torch.stack([*k[b, h, near], *(k[b, h, tile].mean(0) for tile in far)])
                own_v = torch.stack([*v[b, h, near], *(v[b, h, tile].mean(0) for tile in far)])
                counts = torch.tensor([1] * len(near) + [len(tile) for tile in far], dtype=q.dtype)
                for token in queries:
                    logits = scale * own_k @ q[b, h, prefix + token] + counts.log()
                    out[b, h, prefix + token] = logits.softmax(0) @ own_v
    return out


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("tail", [False, True])
def test_equals_its_definition(grid, prefix, tail):
    q, k, v = tensors(grid, prefix)
    queries, keys = len(tiles_of(grid, 4)), len(tiles_of(grid, 2))
    index = torch.rand(2, 2, queries, keys).argsort(-1)[..., : max(keys // 3, 1)]
    for given in (index, index[:1, :1], index[:, :1], index[:1, :1, :1]):
        found = near_far_attention(q, k, v, grid, given, query_tile=4, key_tile=2, tail=tail, prefix=prefix, scale=0.7)
        expected = by_loops(q, k, v, grid, given, 4, 2, tail, prefix, 0.7)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tiles_are_dense_attention(grid, tail, dtype):
    q, k, v = (x.to(dtype) for x in tensors(grid, 1))
    index = torch.stack([torch.randperm(len(tiles_of(grid, 4))) for _ in tiles_of(grid, 8)])[None, None]
    found = near_far_attention(q, k, v, grid, index, tail=tail, prefix=1, scale=0.5)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert (found - expected).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)


def test_heads_of_their_own_number_of_tiles():
    grid = (7, 10)
    q, k, v = tensors(grid, 1)
    index = torch.rand(2, 2, 6, 20).argsort(-1)
    own = [index[:, :1, :, :3], index[:, 1:, :, :11]]
    found = near_far_attention(q, k, v, grid, own, query_tile=4, key_tile=2, prefix=1)
    for head, part in enumerate(own):
        alone = [x[:, head : head + 1] for x in (q, k, v)]
        expected = near_far_attention(*alone, grid, part, query_tile=4, key_tile=2, prefix=1)
        torch.testing.assert_close(found[:, head : head + 1], expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="indices for 1 heads; the layer has 2"):
        near_far_attention(q, k, v, grid, own[:1], query_tile=4, key_tile=2, prefix=1)


def test_keys_constant_in_tiles_need_no_selection():
    grid, keys = (8, 8), tiling((8, 8), 4)
    q, k, v = tensors(grid)
    k = torch.randn(2, 2, 4, 1, 4, dtype=torch.float64).expand(2, 2, 4, 16, 4).flatten(2, 3)[:, :, keys.place]
    nothing = torch.zeros(1, 1, 1, 0, dtype=torch.int64)
    for index in (nothing, torch.tensor([[[[2, 0]]]])):
        found = near_far_attention(q, k, v, grid, index)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=1.0))
    mean = near_far_attention(q, torch.ones_like(k), v, grid, nothing)
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(mean))


def test_permuted_tiles_permute_the_output():
    grid = (8, 12)
    q, k, v = tensors(grid)
    tiles = tiling(grid, 4)
    order = torch.randperm(6)
    index = torch.rand(2, 2, 6, 6).argsort(-1)[..., :2]
    moved = [gather_tiles(x, tiles)[:, :, order].flatten(2, 3)[:, :, tiles.place] for x in (q, k, v)]
    moved_index = order.argsort()[index[:, :, order]]
    for tail in (False, True):
        options = {"query_tile": 4, "key_tile": 4, "tail": tail}
        y = near_far_attention(q, k, v, grid, index, **options)
        found = near_far_attention(*moved, grid, moved_index, **options)
        expected = gather_tiles(y, tiles)[:, :, order].flatten(2, 3)[:, :, tiles.place]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_tiling_of_a_grid_that_tiles_do_not_divide():
    tiles = tiling((5, 3), 2)
    assert tiles.shape == (3, 2)
    assert tiles.tokens.tolist() == [4, 2, 4, 2, 2, 1]
    assert [row[inside].tolist() for row, inside in zip(tiles.table, tiles.inside)] == tiles_of((5, 3), 2)
    x = torch.arange(15.0).view(1, 1, 15, 1)
    torch.testing.assert_close(gather_tiles(x, tiles).flatten(2, 3)[:, :, tiles.place], x)
    assert pool(gather_tiles(x, tiles), tiles).flatten().tolist() == [2, 3.5, 8, 9.5, 12.5, 14]


def test_tile_mass():
    grid = (7, 10)
    q, k, _ = tensors(grid, 2)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    found = tile_mass(q, k, grid, 4, 2, prefix=2)
    for n, queries in enumerate(tiles_of(grid, 4)):
        for u, keys in enumerate(tiles_of(grid, 2)):
            part = weights[:, :, 2:, 2:][:, :, queries][..., keys].sum(-1).mean(-1)
            torch.testing.assert_close(found[:, :, n, u], part)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(1, 1, 1, 2), "float32"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), r"\(1, 2, 2\)"),
        (torch.zeros(1, 3, 1, 2, dtype=torch.int64), "2 or 1"),
        (torch.zeros(1, 1, 3, 2, dtype=torch.int64), "4 or 1, 0 to 16"),
        (torch.zeros(1, 1, 1, 17, dtype=torch.int64), "0 to 16"),
        (torch.tensor([3, 16]).view(1, 1, 1, 2), "selects tiles 3 to 16; the grid has tiles 0 to 15"),
        (torch.tensor([-1, 2]).view(1, 1, 1, 2), "selects tiles -1 to 2"),
        (torch.tensor([5, 2, 5]).view(1, 1, 1, 3), "a tile twice"),
    ],
)
def test_what_is_not_an_index(index, message):
    q, k, v = tensors((16, 16))
    with pytest.raises(InputError, match=message):
        near_far_attention(q, k, v, (16, 16), index)


def test_nothing_to_attend_to():
    q, k, v = tensors((4, 4))
    with pytest.raises(InputError, match="no tail or prefix token"):
        near_far_attention(q, k, v, (4, 4), torch.zeros(1, 1, 1, 0, dtype=torch.int64), tail=False)
