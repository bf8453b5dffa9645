r"""Contract, projections and checks that all mixers share.

A mixer exchanges information between the tokens of a transformer layer; the rest of the layer stays as it is:

    y = mixer(x, grid, context=None, mask=None)

    x        (B, P + H W, C): P prefix tokens (class token, registers), then a grid of H rows and W columns, row by row
    grid     (H, W)
    context  (B, M, C): tokens that keys and values are projected from; None: x itself
    mask     (B, M) of the context, or (B, P + H W) of x, bool: True where a key is valid
    y        as x

All mixers share the input and output projections; the core between them is the mechanism:

    q, k, v = W_q x, W_k context, W_v context        (B, heads, N or M, D)
    y       = W_o core(q, k, v)                      (B, heads, N, D) -> (B, N, C)

The projections have the parameter names and the layout of timm's `Attention`, so that its state dicts load.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError

__all__ = [
    "FEATURES",
    "Grid",
    "GridConvolution",
    "Maybe",
    "Mixer",
    "from_map",
    "masked_mean",
    "pair",
    "softmax_attention",
    "to_map",
]

Grid = tuple[int, int]
Maybe = Tensor | None
FEATURES = ("cross", "prefix", "mask", "any_grid", "bias", "script", "onnx")


def check_tokens(x: Tensor, grid: Grid, num_prefix_tokens: int | None, dim: int) -> None:
    """Reject tokens that do not match the grid and its prefix. A function, so that `torch.fx` does not trace it."""
    if x.dim() != 3:
        raise InputError(f"x must have the shape (B, P + H W, C); got {x.dim()} dimensions.")
    if x.shape[2] != dim:
        raise InputError(f"x must have {dim} channels; got {x.shape[2]}.")
    prefix = x.shape[1] - grid[0] * grid[1]
    if prefix < 0:
        raise InputError(f"A grid of {grid[0]} x {grid[1]} needs at least as many tokens as cells; got {x.shape[1]}.")
    if num_prefix_tokens is not None and prefix != num_prefix_tokens:
        raise InputError(
            f"A grid of {grid[0]} x {grid[1]} and {num_prefix_tokens} prefix tokens do not match {x.shape[1]} tokens."
        )


def check_keys(x: Tensor, context: Maybe, mask: Maybe) -> None:
    """Reject a context of another batch size or width, and a mask that does not match the keys."""
    keys = x if context is None else context
    if keys.dim() != 3 or keys.shape[0] != x.shape[0] or keys.shape[2] != x.shape[2]:
        raise InputError(f"context must have the shape ({x.shape[0]}, M, {x.shape[2]}); got {list(keys.shape)}.")
    if mask is not None and (mask.dtype != torch.bool or list(mask.shape) != list(keys.shape[:2])):
        raise InputError(
            f"mask must be a bool tensor of shape {list(keys.shape[:2])}; got {mask.dtype} {list(mask.shape)}."
        )


torch.fx.wrap("check_tokens")
torch.fx.wrap("check_keys")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Expand one number to both axes; a pair stays as it is."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Maybe = None, bias: Maybe = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, Dv).
        mask: Valid keys, (B, M) bool. A query without a valid key gets zeros.
        bias: Added to the logits, broadcast to (B, heads, N, M).

    Returns:
        (B, heads, N, Dv).
    """
    if mask is not None:
        valid = mask[:, None, None]  # (B, 1, 1, M)
        bias = valid if bias is None else bias.masked_fill(~valid, float("-inf"))
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # The fused form has other strides than its decomposition in an exporter, where later views would fail.
    return torch.stack(y.unbind(1), dim=1)


def masked_mean(x: Tensor, mask: Maybe) -> Tensor:
    """Mean of the valid tokens: (B, heads, M, D), (B, M) bool -> (B, heads, 1, D); zeros if none is valid."""
    if mask is None:
        return x.mean(dim=2, keepdim=True)
    weight = mask[:, None, :, None].to(x.dtype)  # (B, 1, M, 1)
    return (x * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Grid tokens of all heads as a map: (B, heads, H W, D) -> (B, heads D, H, W)."""
    return tokens.transpose(2, 3).flatten(1, 2).unflatten(-1, (grid[0], grid[1]))


def from_map(x: Tensor, num_heads: int, prefix: int) -> Tensor:
    """A map as tokens of all heads, after zeros for prefix tokens: (B, heads D, H, W) -> (B, heads, P + H W, D)."""
    tokens = x.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3)
    return F.pad(tokens, (0, 0, prefix, 0))


class GridConvolution(nn.Conv2d):
    """Depthwise 3 x 3 convolution of grid tokens; prefix tokens get zeros.

    Shape:
        v (B, heads, P + H W, D), grid (H, W) -> (B, heads, P + H W, D).
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, v: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        """Convolve the values of all heads together."""
        prefix = v.shape[2] - grid[0] * grid[1]
        values = to_map(v[:, :, prefix:], grid)
        values = F.conv2d(values, self.weight, self.bias, padding=1, groups=self.groups)
        return from_map(values, v.shape[1], prefix)


class Mixer(nn.Module):
    """Base class of all mixers: checks and projections; a subclass implements `core`.

    Class attributes describe a subclass:

    - `supports`: the features of `FEATURES` that it supports. `cross`: a context; `prefix`: prefix tokens; `mask`:
      invalid keys; `any_grid`: grids other than the one that the parameters were made for; `bias`: an additive bias of
      the logits; `script`: TorchScript; `onnx`: export with dynamic sizes.
    - `limit`: the setting in which it equals softmax attention.
    - `equivariant`: permuted tokens give permuted outputs.
    - `swappable`: the core needs only its arguments, so that `visionattn.swap` can insert it into another layer.

    Args:
        dim: Number of channels C.
        num_heads: Number of heads; C must be divisible by it.
        qkv_bias: Add a bias to the input projections.
        num_prefix_tokens: Number of prefix tokens P that x must have; None: all tokens of x beyond its grid.

    Shape:
        x (B, P + H W, C), grid (H, W), context (B, M, C), mask (B, M) or (B, P + H W) -> (B, P + H W, C).

    Raises:
        InputError: C is not divisible by `num_heads`; in `forward`, if the tokens do not match the grid, or a context,
            mask or prefix is given that the mixer does not support.
    """

    supports: ClassVar[frozenset[str]] = frozenset()
    limit: ClassVar[str] = "none"
    equivariant: ClassVar[bool] = False
    swappable: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads}).")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.dim_head = dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.name = type(self).__name__
        self.takes_context = "cross" in self.supports
        self.takes_mask = "mask" in self.supports
        self.takes_prefix = "prefix" in self.supports
        if num_prefix_tokens and not self.takes_prefix:
            raise InputError(f"{self.name} does not support prefix tokens; got num_prefix_tokens={num_prefix_tokens}.")
        self.make_projections(dd, qkv_bias)

    def make_projections(self, dd: dict, qkv_bias: bool) -> None:
        """Create the input and output projections."""
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=qkv_bias, **dd)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(self.dim, self.dim, **dd)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"{self.dim}, heads={self.num_heads}"

    @torch.jit.ignore
    def extra_parameters(self) -> int:
        """Number of parameters beyond those of softmax attention with the same projections."""
        shared = 4 * self.dim * self.dim + self.dim
        qkv = getattr(self, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv.bias is not None:
            shared += 3 * self.dim
        return sum(p.numel() for p in self.parameters()) - shared

    @torch.jit.ignore
    def macs(self, n: int, m: int | None = None) -> int:
        """Multiply-accumulates for one image, including the projections.

        Args:
            n: Number of tokens of x.
            m: Number of tokens of the context; None: x is its own context.
        """
        m = n if m is None else m
        return 2 * (n + m) * self.dim**2 + self.core_macs(n, m)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Multiply-accumulates of the core, for n queries and m keys."""
        return 2 * n * m * self.dim

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads D) -> (B, heads, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Maybe) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, and keys and values of the context (None: of x): (B, heads, N or M, D)."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[: self.dim], None if bias is None else bias[: self.dim])
            k, v = F.linear(context, weight[self.dim :], None if bias is None else bias[self.dim :]).chunk(2, dim=-1)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        return self.q_norm(q), self.k_norm(k), v

    def check(self, x: Tensor, grid: Grid, context: Maybe, mask: Maybe) -> None:
        """Raise InputError if the arguments do not match or are not supported."""
        check_tokens(x, grid, self.num_prefix_tokens if self.takes_prefix else 0, self.dim)
        if context is not None and not self.takes_context:
            raise InputError(f"{self.name} does not support cross-attention: call it without a context.")
        if mask is not None and not self.takes_mask:
            raise InputError(f"{self.name} does not support a mask of valid keys: call it without a mask.")
        check_keys(x, context, mask)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Mix tokens, given the projections of x and the context.

        Args:
            q: Queries (B, heads, P + H W, D).
            k: Keys (B, heads, M, D).
            v: Values (B, heads, M, D).
            grid: (H, W).
            x: Tokens (B, P + H W, C), for mixers with additional projections.
            mask: Valid keys (B, M), or None.
            bias: Added to the logits, broadcast to (B, heads, P + H W, M), or None; for mixers that support `bias`.

        Returns:
            (B, heads, P + H W, D).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, grid: Grid, context: Maybe = None, mask: Maybe = None) -> Tensor:
        """(B, P + H W, C) -> (B, P + H W, C)."""
        self.check(x, grid, context, mask)
        q, k, v = self.project(x, context)
        y = self.core(q, k, v, grid, x, mask, None)
        return self.proj(y.transpose(1, 2).flatten(2))
