r"""Scores that decide which patch tokens of an image stay, and which kept token represents each of the others.

    merge         rounds of bipartite matching: tokens at even and at odd indices are the two sides; each token of the
                  first side finds its nearest neighbour of the second by cosine; the nearest pairs are replaced by
                  their mean, weighted by size
    grid          cells in the order of a dither matrix: 1/2 is a checkerboard, 1/4 every second row and column
    sensitivity   S_i = (1/m) sum_t |M(x_i + c u_t) - M(x_i - c u_t)| / 2c for unit vectors u_t: the Frobenius norm of
                  the Jacobian of M over sqrt(dim), up to 1/dim
    greedy        first argmax S; then argmax S_i (1 - max over kept j of cos(f_i, f_j)), S scaled to [0, 1]

Sources: ToMe, "token merging" (merge, here on the tokens themselves, and without its attention bias by size);
ZOO-Prune (sensitivity, greedy), from its equations, since no code is published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dither_order", "greedy", "kept_count", "merge", "nearest_kept", "sensitivity", "top"]

_BITS = 8  # of the dither matrix: no two cells are equal in grids up to 256 x 256


def kept_count(n: int, share: tuple[int, int]) -> int:
    """A share of n tokens, rounded up; the share is a numerator and a denominator."""
    numerator, denominator = share
    return (n * numerator + denominator - 1) // denominator


def dither_order(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Importance of the cells of a grid, (H W,) row by row: the cells with the highest values are spread evenly."""
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)[None]
    order = torch.zeros(1, 1, device=device)
    for bit in range(_BITS):
        row, column = y // 2**bit % 2, x // 2**bit % 2
        order = order + (2 * ((row + column) % 2) + row) * 0.25 ** (bit + 1)
    return -order.flatten()


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` tokens with the highest scores, in increasing order: (B, N) -> (B, count)."""
    return scores.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values


def nearest_kept(kept: Tensor, height: int, width: int) -> Tensor:
    """Kept token nearest to each cell of the grid: indices (B, k) -> positions among the kept tokens (B, H W)."""
    y = torch.arange(height, device=kept.device)[:, None].expand(-1, width).flatten()
    x = torch.arange(width, device=kept.device)[None].expand(height, -1).flatten()
    # Rows and columns from a division by a dynamic width could not be exported.
    rows, columns = y[:, None] - y[kept][:, None], x[:, None] - x[kept][:, None]  # (B, N, k)
    return (rows * rows + columns * columns).argmin(dim=2)


def sensitivity(function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, c: float = 0.01) -> Tensor:
    """Mean change of a function of single tokens along unit directions.

    Args:
        function: M, a function of tokens (B, N, C).
        x: Tokens (B, N, C).
        directions: u_t, (m, C).
        c: Step size.

    Returns:
        S (B, N).
    """
    total = torch.zeros_like(x[..., 0])
    for u in directions.to(x):
        total = total + (function(x + c * u) - function(x - c * u)).norm(dim=-1)
    return total / (2 * c * len(directions))


def greedy(scores: Tensor, features: Tensor, count: int) -> Tensor:
    """Choose tokens with high scores that differ from the tokens chosen before.

    Args:
        scores: S (B, N).
        features: f (B, N, D).
        count: Number of tokens to choose. It is fixed in an exported graph: each token is a step.

    Returns:
        Indices in the order of choice, (B, count).
    """
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    scores = torch.where(high > low, (scores - low) / (high - low).clamp_min(1e-30), 1.0)
    unit = F.normalize(features, dim=-1)
    closest = torch.full_like(scores, -1.0)
    gain, chosen = scores, []
    for _ in range(count):
        index = gain.argmax(dim=1, keepdim=True)  # (B, 1)
        chosen.append(index)
        of_chosen = unit.gather(1, index[..., None].expand(-1, -1, unit.shape[2]))
        closest = torch.maximum(closest, (unit @ of_chosen.transpose(1, 2)).squeeze(2))
        gain = gain.scatter(1, index, -torch.inf)
        gain = torch.where(gain == -torch.inf, gain, scores * (1 - closest))
    return torch.cat(chosen, dim=1)


def merge(x: Tensor, share: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Merge similar tokens until a share of them is left.

    Args:
        x: Tokens (B, N, C).
        share: Share of the tokens that stays, as a numerator and a denominator.

    Returns:
        The merged tokens (B, k, C), and the index among them of each token, (B, N).
    """
    batch, n, width = x.shape
    wanted = kept_count(n, share)
    owner = torch.arange(n, device=x.device).expand(batch, -1)
    size = torch.ones_like(x[..., :1])
    left = share
    while left[0] < left[1]:  # a round leaves at least half
        left = (2 * left[0], left[1])
        target: Any = torch.sym_max(wanted, n - n // 2)
        moved, first = n - target, n - n // 2  # tokens merged away, and tokens of the first side
        unit = F.normalize(x, dim=-1)
        cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        best, partner = F.pad(cosine, (0, 1), value=-2.0).max(dim=2)  # a single token has no partner
        stay = best.argsort(dim=1, descending=True)[:, moved:].sort(dim=1).values
        place = torch.arange(first - moved, device=x.device).expand(batch, -1)
        of_first = (partner + first - moved).scatter(1, stay, place)
        of_second = (torch.arange(n - first, device=x.device) + first - moved).expand(batch, -1)
        index = torch.arange(n, device=x.device)
        new = torch.cat([of_first, of_second], dim=1)[:, index // 2 + index % 2 * first]  # (B, n)
        total = torch.zeros_like(x[:, :target]).scatter_add(1, new[..., None].expand(-1, -1, width), x * size)
        size = torch.zeros_like(size[:, :target]).scatter_add(1, new[..., None], size)
        x, n, owner = total / size, target, new.gather(1, owner)
    return x, owner
