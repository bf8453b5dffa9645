r"""Six ablations of attention: which component of softmax attention matters?

With s_ij = q_i . k_j / sqrt(D) and, unless stated otherwise, queries, keys and values of the tokens themselves:

    mlp        y = W_down (SiLU(W_gate x) o W_up x)                      no mixing; width 4 C / 3 for equal parameters
    taylor     weights 1 + s + s^2 / 2 instead of exp(s), rows divided by their sum               "Approximate"
    key_only   one score per key, s_j = sum_c SiLU(q_j)_c k_jc / sqrt(D), weights softmax_j(s_j)  "Non-approximate"
    random_qk  queries and keys of fixed random embeddings, values of the tokens                  "RndEmbQK"
    fixed_qk   queries and keys of one reference input, values of the tokens                      "FixedSeqQK"
    static_qk  queries and keys of the first layer's tokens, values of the tokens                 "StaticEmbQK"

`key_only` has the same attention weights for every query: all tokens receive one vector. The attention maps of
`random_qk` and `fixed_qk` do not depend on the input.

Source: Deconstructing Attention, arXiv 2510.11602; it recommends alternating a simplified layer with a standard one.

Deviations, and why. Nothing is causal. The paper's appendix writes `taylor` with the orders 0, 1 and 2 normalised
separately and summed (`orders="separate"`); order 1 is then divided by the sum of s_ij, which can vanish, so that the
default normalises the orders together. The source's random and reference embeddings pass through the same stack; here
each layer has its own, set by `set_source`, and resizes them bilinearly to other grids. `static_qk` on its own is the
first layer and thus softmax attention; `source` is set for later layers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, pair, softmax_attention
from visionattn.mixers.resampling import interpolate

__all__ = ["FixedQKMixer", "KeyOnlyMixer", "MlpMixer", "RandomQKMixer", "StaticQKMixer", "TaylorMixer"]

ORDERS = ("together", "separate")


class MlpMixer(Mixer):
    """A gated MLP instead of attention, without mixing (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "any_grid", "script", "onnx"})
    swappable = False
    equivariant = True

    def make_projections(self, dd: dict, qkv_bias: bool) -> None:
        """Create the three linear layers of the MLP."""
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
    """Attention with the second-order Taylor series of exp (equations: see the module; other arguments: see `Mixer`).

    Args:
        orders: `"together"`: one sum per row; `"separate"`: each order is divided by its own sum.

    Raises:
        InputError: `orders` is neither of them.
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
    """One score per key, the same for all queries (equations: see the module; arguments: see `Mixer`)."""

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
    """Attention with the attention map of a reference input (equations: see the module; other arguments: see `Mixer`).

    Before `set_source` is called the reference is zero, so the map is uniform.

    Args:
        grid_size: Grid of the reference: its side, or (H, W).

    Raises:
        InputError: A side is below 1.
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
        """Set the reference tokens (1, P + H W, C), with a grid of `grid_size`; prefix tokens are averaged."""
        check = self.grid_size[0] * self.grid_size[1]
        if tokens.dim() != 3 or tokens.shape[0] != 1 or tokens.shape[2] != self.dim or tokens.shape[1] < check:
            raise InputError(f"tokens must have the shape (1, P + {check}, {self.dim}); got {list(tokens.shape)}.")
        prefix = tokens.shape[1] - check
        with torch.no_grad():
            self.source.copy_(tokens[:, prefix:].transpose(1, 2).unflatten(2, self.grid_size))
            if prefix:
                self.prefix_source.copy_(tokens[:, :prefix].mean(dim=1)[..., None])

    def source_tokens(self, grid: Grid, prefix: int) -> Tensor:
        """The reference resized to a grid, (1, P + H W, C)."""
        cells = interpolate(self.source, grid[0], grid[1])
        return torch.cat([self.prefix_source.expand(-1, -1, prefix), cells.flatten(2)], dim=2).transpose(1, 2)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend with queries and keys of the reference."""
        tokens = self.source_tokens(grid, x.shape[1] - grid[0] * grid[1])
        q, k, _ = self.project(tokens, None)
        return softmax_attention(q.expand_as(v), k.expand_as(v), v, mask)


class RandomQKMixer(FixedQKMixer):
    """Attention with the map of random embeddings (equations: see the module; other arguments: see `FixedQKMixer`).

    Args:
        seed: Seed of the embeddings, which are drawn from N(0, 1) and stored in the state dict.
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

    `source` holds these tokens, (B, P + H W, C), while a network runs; None: the layer uses its own tokens.
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
