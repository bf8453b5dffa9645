r"""Six attentions with parts taken away: which part of softmax attention matters?

With s_ij = q_i . k_j / sqrt(D) and, except where said, queries, keys and values of the tokens themselves:

    mlp        y = W_down (SiLU(W_gate x) o W_up x)                      no mixing; width 4 C / 3: as many parameters
    taylor     weights 1 + s + s^2 / 2 instead of exp(s), rows divided by their sum               "Approximate"
    key_only   one score per key, s_j = sum_c SiLU(q_j)_c k_jc / sqrt(D), weights softmax_j(s_j)  "Non-approximate"
    random_qk  queries and keys of fixed random embeddings, values of the tokens                  "RndEmbQK"
    fixed_qk   queries and keys of one reference input, values of the tokens                      "FixedSeqQK"
    static_qk  queries and keys of the tokens of the first layer, values of the tokens            "StaticEmbQK"

`key_only` has the same weights for every query: one vector, given to all tokens. The maps of `random_qk` and `fixed_qk`
do not depend on the input.

Source: Deconstructing Attention, arXiv 2510.11602; it recommends to alternate a
simplified layer with a standard one.

Deviations, and why. Nothing is causal. `taylor` as written in the paper's appendix normalises the orders 0, 1 and 2
separately and sums them (`orders="separate"`); the sum of s_ij by which order 1 is divided can vanish, so that the
orders are normalised together unless asked. The source's random and reference embeddings pass through the same stack;
here each layer has its own, given by `set_source`, and resizes them bilinearly to other grids. `static_qk` alone is the
first layer and thus softmax attention; `source` is set for layers behind it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, pair, softmax_attention

__all__ = ["FixedQKMixer", "KeyOnlyMixer", "MlpMixer", "RandomQKMixer", "StaticQKMixer", "TaylorMixer"]

ORDERS = ("together", "separate")


class MlpMixer(Mixer):
    """A gated MLP in place of attention: no mixing (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "any_grid", "script", "onnx"})
    swappable = False
    equivariant = True

    def make_projections(self, dd: dict, qkv_bias: bool) -> None:
        """The three maps of the MLP."""
        width = 4 * self.dim // 3
        self.gate = nn.Linear(self.dim, width, bias=qkv_bias, **dd)
        self.up = nn.Linear(self.dim, width, bias=qkv_bias, **dd)
        self.down = nn.Linear(width, self.dim, **dd)

    def forward(self, x: Tensor, grid: Grid, context: Maybe = None, mask: Maybe = None) -> Tensor:
        """(B, P + H W, C) -> (B, P + H W, C)."""
        self.check(x, grid, context, mask)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    @torch.jit.ignore
    def macs(self, n: int, m: int | None = None) -> int:
        """Three products with the hidden width."""
        return 3 * n * self.dim * (4 * self.dim // 3)


class TaylorMixer(Mixer):
    """Attention with the second-order series of the exponential (equations: see the module; others: see `Mixer`).

    Args:
        orders: `"together"`: one sum for each row; `"separate"`: each order divided by its own sum.

    Raises:
        InputError: An unknown choice of orders.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    limit = "small logits: the error of a weight is of the order s^3 / 6"
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        orders: str = "together",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if orders not in ORDERS:
            raise InputError(f"orders must be one of {', '.join(map(repr, ORDERS))}; got {orders!r}.")
        self.separate = orders == "separate"

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Weigh by the series."""
        s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, M)
        valid = torch.ones_like(s) if mask is None else mask[:, None, None].to(s.dtype).expand_as(s)
        if self.separate:
            first, second = s * valid, s.square() * valid
            y = (valid / valid.sum(-1, keepdim=True)) @ v + (first / first.sum(-1, keepdim=True)) @ v
            return y + (second / second.sum(-1, keepdim=True)) @ v
        weights = (1 + s + s.square() / 2) * valid
        return (weights / weights.sum(-1, keepdim=True)) @ v


class KeyOnlyMixer(Mixer):
    """One score for each key, the same for all queries (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "mask", "any_grid", "script", "onnx"})
    equivariant = True

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Weigh the keys once."""
        scores = (F.silu(q) * k).sum(dim=-1) * q.shape[-1] ** -0.5  # (B, heads, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return (scores.softmax(dim=-1)[:, :, None] @ v).expand_as(q)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """One score and one product per key."""
        return 2 * m * self.dim


class FixedQKMixer(Mixer):
    """Attention with the map of a reference input (equations: see the module; other arguments: see `Mixer`).

    Until `set_source` gives a reference, the map is uniform but for the biases of the projections.

    Args:
        grid_size: Side of the reference's grid, or (H, W).
    """

    supports = frozenset({"prefix", "mask", "any_grid", "script", "onnx"})
    swappable = False
    limit = "the input as its own reference"
    source: Tensor
    prefix_source: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        grid_size: int | tuple[int, int] = 14,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        self.grid_size = pair(grid_size)
        if min(self.grid_size) < 1:
            raise InputError(f"grid_size must be at least 1; got {grid_size}.")
        cells = (1, dim, self.grid_size[0], self.grid_size[1])
        self.register_buffer("source", torch.zeros(cells, device=device, dtype=dtype))
        self.register_buffer("prefix_source", torch.zeros(1, dim, 1, device=device, dtype=dtype))

    @torch.jit.ignore
    def set_source(self, tokens: Tensor) -> None:
        """Take the tokens (1, P + H W, C) of a reference, with the grid of `grid_size`; P is 0 or 1, or all alike."""
        check = self.grid_size[0] * self.grid_size[1]
        if tokens.dim() != 3 or tokens.shape[0] != 1 or tokens.shape[2] != self.dim or tokens.shape[1] < check:
            raise InputError(f"tokens must have the shape (1, P + {check}, {self.dim}); got {list(tokens.shape)}.")
        prefix = tokens.shape[1] - check
        with torch.no_grad():
            self.source.copy_(tokens[:, prefix:].transpose(1, 2).unflatten(2, self.grid_size))
            if prefix:
                self.prefix_source.copy_(tokens[:, :prefix].mean(dim=1)[..., None])

    def source_tokens(self, grid: Grid, prefix: int) -> Tensor:
        """The reference at a grid, (1, P + H W, C)."""
        cells = F.interpolate(self.source, size=[grid[0], grid[1]], mode="bilinear", align_corners=False)
        return torch.cat([self.prefix_source.expand(-1, -1, prefix), cells.flatten(2)], dim=2).transpose(1, 2)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend with queries and keys of the reference."""
        tokens = self.source_tokens(grid, x.shape[1] - grid[0] * grid[1])
        q, k, _ = self.project(tokens, None)
        return softmax_attention(q.expand_as(v), k.expand_as(v), v, mask)


class RandomQKMixer(FixedQKMixer):
    """Attention with the map of random embeddings (equations: see the module; others: see `FixedQKMixer`).

    Args:
        seed: Of the embeddings, which are drawn from N(0, 1) and kept in the state dict.
    """

    limit = "none"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        grid_size: int | tuple[int, int] = 14,
        seed: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, grid_size, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for buffer in (self.source, self.prefix_source):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, device="cpu"))


class StaticQKMixer(Mixer):
    """Attention with the map of the first layer's tokens (equations: see the module; arguments: see `Mixer`).

    `source` holds these tokens, (B, P + H W, C), while a network runs; None: the layer's own.
    """

    supports = frozenset({"prefix", "mask", "any_grid", "onnx"})
    swappable = False
    limit = "source None: the first layer"
    equivariant = True
    source: Maybe = None

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend with queries and keys of the first layer's tokens."""
        if self.source is not None:
            q, k, _ = self.project(self.source, None)
        return softmax_attention(q, k, v, mask)
