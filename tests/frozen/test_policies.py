"""Selection policies."""

import pytest
import torch

from tests.frozen.toys import golden
from visionattn.errors import InputError
from visionattn.frozen.policies import (
    POLICIES,
    HeadBudgets,
    Mass,
    Policy,
    Pooled,
    Random,
    Reuse,
    Strided,
    TailOnly,
    Tree,
    Window,
    first_tile_score,
    morton_order,
    tree_search,
)
from visionattn.frozen.tiles import gather_tiles, near_far_attention, tiling


def tensors(grid, heads=2, width=4):
    return [torch.randn(2, heads, grid[0] * grid[1], width, dtype=torch.float64) for _ in range(3)]


def every():
    return [*POLICIES.values(), lambda **settings: Tree(pooled=True, **settings)]


@pytest.mark.parametrize("make", every())
@pytest.mark.parametrize("grid", [(16, 16), (9, 14)])
def test_indices_are_valid_and_a_whole_budget_is_dense(make, grid):
    q, k, v = tensors(grid)
    for tail in (False, True):
        for budget in (0.4, 1.0):
            policy = make(budget=budget, tail=tail, query_tile=4, key_tile=2)
            index = policy(q, k, grid, 0, {})
            if index is None or isinstance(policy, TailOnly):
                continue
            tiles = len(tiling(grid, policy.key_tile).table)
            assert index.dtype == torch.int64
            assert 0 <= index.min() <= index.max() < tiles
            assert all(len(set(row)) == index.shape[3] for row in index.flatten(0, 2).tolist())
            if budget == 1:
                options = {"query_tile": 4, "key_tile": policy.key_tile, "tail": tail}
                found = near_far_attention(q, k, v, grid, index, **options)
                assert (found - (q @ k.transpose(-1, -2)).softmax(-1) @ v).abs().max() < 1e-6
            else:
                keys = index.shape[3] * policy.key_tile**2 + tiles * tail
                assert abs(keys / (grid[0] * grid[1]) - 0.4) < 0.1


def test_budget_counts_the_tail():
    assert Window(0.125).keep((64, 64)) == (512 - 256) // 16
    assert Window(0.125, tail=False).keep((64, 64)) == 512 // 16
    assert Window(0.125).keep((8, 8)) == 1
    assert Strided(0.125, tail=False).keep((64, 64)) == 512
    assert Strided(0.125, tail=False).key_tile == 1


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan"), "half"])
def test_budgets_outside_of_their_range(budget):
    with pytest.raises(InputError, match=r"budget must be in \(0, 1\]; got"):
        Policy(budget)


@pytest.mark.parametrize(("query_tile", "key_tile"), [(8, 3), (8, 0), (0, 4), (8, 16), (8.0, 4), (2048, 4)])
def test_tiles_that_do_not_divide(query_tile, key_tile):
    with pytest.raises(InputError, match="query_tile must be"):
        Policy(query_tile=query_tile, key_tile=key_tile)


def test_settings_that_are_not_possible():
    with pytest.raises(InputError, match="tail must be true or false; got 3"):
        Window(tail=3)
    with pytest.raises(InputError, match=r"none greater than its own position; got \[0, 2\]"):
        Reuse(sources=[0, 2])
    with pytest.raises(InputError, match=r"counts must be numbers of tiles of at least 1; got \[\[0\]\]"):
        HeadBudgets(counts=[[0]])


def test_strided_is_a_regular_grid():
    q, k, _ = tensors((8, 12))
    index = Strided(0.25, tail=False)(q, k, (8, 12), 0, {})
    assert index.flatten().tolist() == [y * 12 + x for y in (1, 3, 5, 7) for x in (1, 3, 5, 7, 9, 11)]


def test_random_is_uniform_and_repeats():
    q, k, _ = tensors((32, 32), heads=1)
    one = Random(0.25, tail=False)(q, k, (32, 32), 3, {})
    assert one.shape == (1, 1, 16, 256)
    torch.testing.assert_close(one, Random(0.25, tail=False)(q, k, (32, 32), 3, {}))
    other = Random(0.25, tail=False)(q, k, (32, 32), 4, {})
    for found in (one, other):
        counts = found.flatten().bincount(minlength=1024).float()
        assert abs(counts.var().item() - 16 * 0.25 * 0.75) < 0.6  # binomial
    shared = len(set(one[0, 0, 0].tolist()) & set(other[0, 0, 0].tolist()))
    assert abs(shared - 64) < 25


def test_window_holds_the_nearest_tiles_and_is_shifted_at_borders():
    q, k, _ = tensors((24, 24))
    index = Window(36 / 144, tail=False, query_tile=4, key_tile=2)(q, k, (24, 24), 0, {})[0, 0]
    assert index.shape == (36, 36)
    y, x = index // 12, index % 12
    assert sorted({int(v) for v in y[14]}) == list(range(2, 8))  # query tile 2, 2: key tiles 4 and 5 in the middle
    assert sorted({int(v) for v in x[14]}) == list(range(2, 8))
    assert y[0].max() == 5
    assert x[0].max() == 5


def test_pooled_and_mass_select_the_largest():
    grid = (8, 8)
    q, k, _ = tensors(grid)
    queries, keys = gather_tiles(q, tiling(grid, 4)), gather_tiles(k, tiling(grid, 2))
    scores = queries.mean(3) @ keys.mean(3).transpose(-1, -2)
    policy = Pooled(5 / 16, tail=False, query_tile=4, key_tile=2)
    torch.testing.assert_close(policy(q, k, grid, 0, {}), scores.topk(5).indices)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    mass = gather_tiles(gather_tiles(weights, tiling(grid, 4)).mean(3).transpose(-1, -2), tiling(grid, 2)).sum(3)
    found = Mass(5 / 16, tail=False, query_tile=4, key_tile=2)(q, k, grid, 0, {})
    torch.testing.assert_close(found, mass.transpose(-1, -2).topk(5).indices)


def test_permuted_tiles_permute_the_selection_by_content():
    grid, tiles = (8, 12), tiling((8, 12), 4)
    q, k, v = tensors(grid)
    order = torch.randperm(6)
    moved = [gather_tiles(x, tiles)[:, :, order].flatten(2, 3)[:, :, tiles.place] for x in (q, k, v)]
    for kind in (Pooled, Mass):
        policy = kind(2 / 6, tail=False, query_tile=4, key_tile=4)
        index, other = policy(q, k, grid, 0, {}), policy(*moved[:2], grid, 0, {})
        torch.testing.assert_close(order[other], index[:, :, order])


def test_morton_order():
    assert morton_order((4, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert morton_order((3, 2)).tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(morton_order((5, 7)).tolist()) == list(range(35))


@pytest.mark.parametrize("rows", ["all", "odd"])
def test_tree_equals_hip(rows):
    case = golden("hip")
    q, k = (torch.from_numpy(case[name]) for name in "qk")
    size = int(case["block_q"]) if rows == "all" else int(case["block_q"]) // 2
    queries = (q if rows == "all" else q[1::2]).view(1, 1, -1, size, 16)
    keys = k.view(1, 1, -1, int(case["block_k"]), 16)
    keep = int(case["keys"]) // int(case["block_k"])
    found = tree_search(first_tile_score(queries, keys), queries.shape[:3], keys.shape[2], keep)
    expected = torch.from_numpy(case[f"block_starts_{rows}_rows"]).long()
    assert (found[0, 0] * int(case["block_k"])).tolist() == expected.tolist()


def test_tree_equals_a_search_by_loops():
    q, k = torch.randn(2, 3, 5), torch.randn(16, 2, 5)  # two tiles of 3 queries, 16 tiles of 2 keys
    found = tree_search(first_tile_score(q[None, None], k[None, None]), (1, 1, 2), 16, 4)
    for row in range(2):
        groups = [(start, 4) for start in (0, 4, 8, 12)]
        while max(size for _, size in groups) > 1:
            halves = [half for start, size in groups for half in ((start, size // 2), (start + size // 2, size // 2))]
            groups = sorted(halves, key=lambda half: -float((q[row] @ k[half[0]].T).max()))[:4]
        assert found[0, 0, row].tolist() == sorted(start for start, _ in groups)


@pytest.mark.parametrize(("count", "keep"), [(16, 4), (21, 5), (7, 7), (9, 1)])
def test_tree_by_tile_scores_finds_the_tiles_of_the_largest_sums(count, keep):
    """With scores that fall along the order, the first tiles."""

    def score(start, size):
        return -start.double()

    found = tree_search(score, (1, 1, 2), count, keep)
    assert found.shape == (1, 1, 2, keep)
    assert found[0, 0, 0].tolist() == list(range(keep))


def test_reuse_reads_its_source():
    grid = (8, 8)
    q, k, _ = tensors(grid)
    other, _, _ = tensors(grid)
    policy = Reuse(0.3, query_tile=4, key_tile=2, sources=[0, 0, 2])
    state = {}
    assert policy(q, k, grid, 0, state) is None
    expected = Mass(0.3, query_tile=4, key_tile=2)(q, k, grid, 0, {})
    torch.testing.assert_close(policy(other, k, grid, 1, state), expected)
    assert policy(other, k, grid, 2, state) is None
    assert policy(other, k, grid, 5, state) is None  # beyond the plan
    assert policy(other, k, grid, 1, {}) is None  # its source did not run
    tree = Reuse(0.3, query_tile=4, key_tile=2, sources=[0, 0], select="tree")
    torch.testing.assert_close(tree(q, k, grid, 0, {}), Tree(0.3, query_tile=4, key_tile=2)(q, k, grid, 0, {}))
    with pytest.raises(InputError, match="must be one of 'mass', 'tree'; got 'grid'"):
        Reuse(select="grid")


def test_heads_have_budgets_of_their_own():
    grid = (8, 8)
    q, k, _ = tensors(grid)
    policy = HeadBudgets(0.3, query_tile=4, key_tile=2, counts=[[1, 4], []])
    index = policy(q, k, grid, 0, {})
    assert [own.shape for own in index] == [(2, 1, 4, 1), (2, 1, 4, 4)]
    pooled = Pooled(0.3, query_tile=4, key_tile=2)
    torch.testing.assert_close(policy(q, k, grid, 1, {}), pooled(q, k, grid, 1, {}))
    with pytest.raises(InputError, match="counts has 2 heads for layer 0, which has 3 heads"):
        policy(*tensors(grid, heads=3)[:2], grid, 0, {})
