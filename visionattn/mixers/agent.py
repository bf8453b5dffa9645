r"""Agent attention: a few agent tokens attend to all keys, and all queries attend to the agents.

    A   = average pooling of the queries' grid to sqrt(n) x sqrt(n)                 (n, D) agents of each head
    V_A = softmax(A K^T / sqrt(D) + B_1) V                                          (n, D)
    Y   = softmax(Q A^T / sqrt(D) + B_2) V_A + conv3x3(V)                           (N, D)

Each bias is the sum of a 7 x 7 table, resized to the grid, of one table along rows and of one along columns; for prefix
tokens it is a separate entry. Prefix tokens are queries, keys and values, but the agents and the convolution leave them
out.

Source: Agent Attention, arXiv 2312.08874; the DeiT form. Parameters have the names and the layout of the authors' code,
which assumes a square grid and one class token.

Deviations, and why. The authors' code rejects grids other than `grid_size`; here the tables of rows and columns are
resized linearly. All prefix tokens share the entries of the class token.

Cost: 4 n N C multiply-accumulates, 9 N C for the convolution and N sqrt(n) C for the pooling.
"""

import math

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, GridConvolution, Maybe, Mixer, pair, softmax_attention
from visionattn.mixers.resampling import averages, interpolate

__all__ = ["AgentMixer"]


class AgentMixer(Mixer):
    """Softmax attention through agent tokens (equations: see the module; other arguments: see `Mixer`).

    Args:
        num_agents: Number of agents n, a square number.
        grid_size: Grid that the tables of rows and columns are made for: its side, or (H, W).

    Raises:
        InputError: `num_agents` is not a square number, or a size is below 1.
    """

    supports = frozenset({"prefix", "any_grid", "script", "onnx"})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        num_agents: int = 49,
        grid_size: int | tuple[int, int] = 14,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        dd = {"device": device, "dtype": dtype}
        height, width = pair(grid_size)
        self.side = math.isqrt(max(num_agents, 0))
        if num_agents < 1 or self.side**2 != num_agents or min(height, width) < 1:
            raise InputError(f"num_agents must be a square number and grid_size at least 1; got {num_agents}.")
        self.dwc = GridConvolution(dim, **dd)
        self.an_bias = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, height, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, width, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, num_heads, height, 1, num_agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, num_heads, 1, width, num_agents, **dd))
        self.ac_bias = nn.Parameter(torch.empty(1, num_heads, num_agents, 1, **dd))
        self.ca_bias = nn.Parameter(torch.empty(1, num_heads, 1, num_agents, **dd))
        for table in (self.an_bias, self.na_bias, self.ah_bias, self.aw_bias):
            trunc_normal_(table, std=0.02)
        for table in (self.ha_bias, self.wa_bias, self.ac_bias, self.ca_bias):
            trunc_normal_(table, std=0.02)

    def table(self, cells: Tensor, rows: Tensor, columns: Tensor, first: Tensor, grid: Grid, prefix: int) -> Tensor:
        """Bias (1, heads, n, P + H W) from cells (heads, n, 7, 7) and rows, columns and first (heads, n, length)."""
        table = interpolate(cells, grid[0], grid[1])
        table = table + interpolate(rows[..., None], grid[0], 1)
        table = table + interpolate(columns[:, :, None], 1, grid[1])
        return torch.cat([first.expand(-1, -1, prefix), table.flatten(2)], dim=2)[None]

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Agents attend to the keys, then queries attend to the agents."""
        prefix = q.shape[2] - grid[0] * grid[1]
        cells = q[:, :, prefix:].unflatten(2, (grid[0], grid[1]))  # (B, heads, H, W, D)
        pooled = averages(grid[1], self.side, q) @ cells  # (B, heads, H, sqrt n, D)
        pooled = averages(grid[0], self.side, q) @ pooled.transpose(2, 3)
        agents = pooled.transpose(2, 3).flatten(2, 3)  # (B, heads, n, D)
        gather = self.table(
            self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], self.ac_bias[0], grid, prefix
        )
        rows, columns = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        give = self.table(self.na_bias, rows, columns, self.ca_bias[0].transpose(1, 2), grid, prefix).transpose(2, 3)
        values = softmax_attention(agents, k, v, bias=gather)
        return softmax_attention(q, agents, values, bias=give) + self.dwc(v, grid)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Two attentions with n agents, the convolution and the pooling."""
        return (4 * self.side**2 + 9 + self.side) * n * self.dim
