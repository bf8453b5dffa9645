"""Hierarchical self-attention against its tied matrix, against a numeric optimum, and its cost."""

import math

import pytest
import torch
from torch import Tensor

from tests.mixers.contract import peak_memory
from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.core import softmax_attention
from visionattn.mixers.hsa import hierarchical_attention


def draw(tokens: int, heads: int = 2, width: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, tokens, width, dtype=torch.float64) * 1.5 for _ in range(3)]


def tree(grid: tuple[int, int], windows: list[int]) -> list[Tensor]:
    """Number of each token's node, level by level, the tokens themselves first and the root last."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    levels, side = [], 1
    for factor in (1, *windows):
        side *= factor
        levels.append((y // side * 1000 + x // side).flatten())
    return [*levels, torch.zeros_like(levels[0])]


def siblings_tied(levels: list[Tensor]) -> Tensor:
    """Number of the ordered pair of siblings that each pair of tokens belongs to, (N, N)."""
    names: dict[tuple, int] = {}
    n = len(levels[0])
    tied = torch.empty(n, n, dtype=torch.long)
    for i in range(n):
        for j in range(n):
            level = next(number for number in range(len(levels)) if levels[number][i] == levels[number][j])
            low = max(level - 1, 0)
            key = (low, int(levels[low][i]), int(levels[low][j]))
            tied[i, j] = names.setdefault(key, len(names))
    return tied


def divergence(theta: Tensor, logits: Tensor) -> Tensor:
    return (theta * (theta.log() - logits.log_softmax(dim=-1))).sum()


@pytest.mark.parametrize(("grid", "windows"), [((4, 6), [2]), ((4, 5), [2, 2]), ((3, 7), [3]), ((1, 6), [2])])
def test_nearest_of_all_tied_matrices(grid, windows):
    """No other row-stochastic matrix with tied entries has a smaller divergence from softmax attention."""
    n = grid[0] * grid[1]
    q, k, _ = draw(n, heads=1)
    identity = torch.eye(n, dtype=torch.float64)[None, None]
    theta = hierarchical_attention(q, k, identity, grid, windows)[0, 0]
    tied = siblings_tied(tree(grid, windows))
    torch.testing.assert_close(theta.sum(dim=-1), torch.ones(n, dtype=torch.float64))
    for pair in range(int(tied.max()) + 1):
        entries = theta[tied == pair]
        torch.testing.assert_close(entries, entries[:1].expand_as(entries))
    logits = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)[0, 0]
    smallest = divergence(theta, logits)

    # Lagrangian: at the optimum the gradient of each tied entry is a sum of its rows' multipliers.
    free = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(divergence(free, logits), free)[0]
    pairs = int(tied.max()) + 1
    by_pair = torch.zeros(pairs, dtype=torch.float64).index_add(0, tied.flatten(), gradient.flatten())
    rows = torch.zeros(pairs, n, dtype=torch.float64)
    for i in range(n):
        rows[:, i] = torch.bincount(tied[i], minlength=pairs).double()
    multipliers = torch.linalg.lstsq(rows, by_pair[:, None]).solution
    torch.testing.assert_close(rows @ multipliers, by_pair[:, None], rtol=0, atol=1e-9)
    assert smallest > 0


def test_two_levels_as_written():
    grid, side = (4, 6), 2
    q, k, v = draw(24)
    found = hierarchical_attention(q, k, v, grid, [side])
    window = tree(grid, [side])[1]
    scale = q.shape[-1] ** -0.5
    names = window.unique()
    inside = [window == name for name in names]
    means = [[x[:, :, mask].mean(dim=2) for mask in inside] for x in (q, k, v)]
    for a, mask in enumerate(inside):
        logits = q[:, :, mask] @ k[:, :, mask].transpose(-2, -1) * scale
        own = logits.logsumexp(dim=-1).mean(dim=-1)
        others = [(means[0][a] * key).sum(dim=-1) * scale + math.log(4) for key in means[1]]
        others[a] = own
        weights = torch.stack(others, dim=-1).softmax(dim=-1)
        y = weights[..., a, None, None] * (logits.softmax(dim=-1) @ v[:, :, mask])
        for b in range(len(names)):
            if b != a:
                y = y + weights[..., b, None, None] * means[2][b][:, :, None]
        torch.testing.assert_close(found[:, :, mask], y, rtol=0, atol=1e-12)


def test_limits():
    q, k, v = draw(20)
    dense = softmax_attention(q, k, v)
    torch.testing.assert_close(hierarchical_attention(q, k, v, (4, 5), [5]), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(hierarchical_attention(q, k, v, (4, 5), [1]), dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(hierarchical_attention(q, k, v, (3, 6), [1, 1]), dense, rtol=0, atol=1e-12)


def test_prefix_tokens():
    """As keys they are leaves beside the windows, as queries they see everything."""
    grid = (2, 4)
    q, k, v = draw(9)
    found = hierarchical_attention(q, k, v, grid, [2])
    torch.testing.assert_close(found[:, :, :1], softmax_attention(q[:, :, :1], k, v), rtol=0, atol=1e-12)
    scale = q.shape[-1] ** -0.5
    left, right = torch.tensor([1, 2, 5, 6]), torch.tensor([3, 4, 7, 8])
    logits = q[:, :, left] @ k[:, :, left].transpose(-2, -1) * scale
    mean = [x[:, :, left].mean(dim=2) for x in (q, k, v)]
    other = [x[:, :, right].mean(dim=2) for x in (q, k, v)]
    own = logits.logsumexp(dim=-1).mean(dim=-1)
    far = (mean[0] * other[1]).sum(dim=-1) * scale + math.log(4)
    first = (mean[0] * k[:, :, 0]).sum(dim=-1) * scale
    weights = torch.stack([own, far, first], dim=-1).softmax(dim=-1)[..., None]
    y = weights[:, :, 0, None] * (logits.softmax(dim=-1) @ v[:, :, left])
    y = y + (weights[:, :, 1] * other[2] + weights[:, :, 2] * v[:, :, 0])[:, :, None]
    torch.testing.assert_close(found[:, :, left], y, rtol=0, atol=1e-12)


def test_mask_is_a_smaller_grid():
    """A grid whose last column is invalid gives what the grid without it gives."""
    q, k, v = draw(16)
    narrow = torch.arange(16) % 4 < 3
    found = hierarchical_attention(q, k, v, (4, 4), [2], mask=narrow[None])
    expected = hierarchical_attention(*[x[:, :, narrow] for x in (q, k, v)], (4, 3), [2])
    torch.testing.assert_close(found[:, :, narrow], expected, rtol=0, atol=1e-12)


def test_cost():
    mixer = MIXERS["hsa"](192, 3, windows=7)
    assert mixer.core_macs(196, 196) == 2 * 192 * (196 * 49 + 16)
    assert mixer.extra_parameters() == 0
    matrix = 3 * 3136**2 * 4
    assert peak_memory(MIXERS["hsa"](96, 3, windows=7).eval(), torch.randn(1, 3136, 96), (56, 56)) < matrix / 4


def test_bad_settings():
    with pytest.raises(InputError, match="windows must be one side or more, each at least 1; got 0"):
        MIXERS["hsa"](8, 2, windows=0)
    with pytest.raises(InputError, match="windows must be one side or more"):
        MIXERS["hsa"](8, 2, windows=())
