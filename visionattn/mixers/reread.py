r"""Pooled re-read: pooled tokens attend to all tokens to recover what pooling lost.

    P = average pooling of the grid of X over r x r cells
    P <- P + tanh(g) W_o Attention(W_q P, W_k X, W_v X)          g = 0 at the start: plain pooling

`pooled` returns P, a grid of ceil(H / r) x ceil(W / r) tokens, as a layer that reduces resolution. The mixer copies
each pooled token to all tokens of its cell. With a context the tokens x themselves are the queries,

    x <- x + tanh(g) W_o Attention(W_q x, W_k context, W_v context)

for x already pooled with the full tokens as the context, or for text as the context. Prefix tokens are not pooled; they
are queries and keys.

Source: CrossLMM, arXiv 2505.17020, equations 4 to 10.

Deviation. P is the average over cells, while the paper resizes bilinearly; cells at the border may be smaller.

Cost: 2 (N / r^2) N C multiply-accumulates, without the projections.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, softmax_attention

__all__ = ["RereadMixer"]


class RereadMixer(Mixer):
    """Attention of pooled tokens to the full ones (equations: see the module; other arguments: see `Mixer`).

    Args:
        pool: Side r of the pooled cells, in tokens.

    Raises:
        InputError: `pool` is below 1.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    swappable = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        pool: int = 2,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if pool < 1:
            raise InputError(f"pool must be at least 1; got {pool}.")
        self.pool = pool
        self.gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def read(self, x: Tensor, context: Tensor, mask: Maybe = None) -> Tensor:
        """Compute x + tanh(g) Attention(x, context, context): (B, N, C), (B, M, C) -> (B, N, C)."""
        q, k, v = self.project(x, context)
        y = softmax_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return x + self.gate.tanh() * self.proj(y)

    def pooled(self, x: Tensor, grid: Grid, mask: Maybe = None) -> Tensor:
        """Pool the grid and re-read it: (B, P + H W, C) -> (B, P + ceil(H / r) ceil(W / r), C)."""
        prefix = x.shape[1] - grid[0] * grid[1]
        cells = x[:, prefix:].transpose(1, 2).unflatten(2, (grid[0], grid[1]))  # (B, C, H, W)
        right, below = -grid[1] % self.pool, -grid[0] % self.pool
        means = F.avg_pool2d(F.pad(cells, (0, right, 0, below)), self.pool)
        inside = F.avg_pool2d(F.pad(torch.ones_like(cells[:1, :1]), (0, right, 0, below)), self.pool)
        tokens = torch.cat([x[:, :prefix], (means / inside).flatten(2).transpose(1, 2)], dim=1)
        return self.read(tokens, x, mask)

    def forward(self, x: Tensor, grid: Grid, context: Maybe = None, mask: Maybe = None) -> Tensor:
        """(B, P + H W, C) -> (B, P + H W, C)."""
        self.check(x, grid, context, mask)
        if context is not None:
            return self.read(x, context, mask)
        prefix = x.shape[1] - grid[0] * grid[1]
        y = self.pooled(x, grid, mask)
        rows = torch.arange(grid[0], device=x.device) // self.pool
        columns = torch.arange(grid[1], device=x.device) // self.pool
        index = rows[:, None] * ((grid[1] + self.pool - 1) // self.pool) + columns  # (H, W)
        return torch.cat([y[:, :prefix], y[:, prefix:].index_select(1, index.flatten())], dim=1)

    @torch.jit.ignore
    def macs(self, n: int, m: int | None = None) -> int:
        """Projections of pooled queries and of all keys, and their attention."""
        queries, keys = (-(-n // self.pool**2), n) if m is None else (n, m)
        return 2 * (queries + keys) * self.dim**2 + 2 * queries * keys * self.dim
