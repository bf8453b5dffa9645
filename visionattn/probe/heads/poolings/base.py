"""Base of the poolings: their interface, and attention."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionattn.errors import InputError

__all__ = ["Pooling", "attend", "check_heads", "check_patches"]


class Pooling(nn.Module):
    """Base of the poolings: (B, N, D) -> (B, out_dim), any N unless the constructor takes a `grid`.

    Attributes:
        tokens: Kind of the tokens that it reads: `"patches"`, `"class"` (the class token as (B, 1, D)) or `"all"` (the
            class token, then the patches).
        out_dim: Width of the vector.
    """

    tokens = "patches"
    out_dim: int


def check_heads(dim: int, num_heads: int) -> None:
    """Check that the width is divisible by the number of heads."""
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads}).")


def check_patches(tokens: torch.Tensor, grid: tuple[int, int]) -> None:
    """Check that the number of tokens matches the grid."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise InputError(f"{tokens.shape[1]} tokens do not match the grid of {grid[0]} x {grid[1]} patches.")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int = 1) -> torch.Tensor:
    """MHA_h: q (B or 1, M, D), k and v (B, N, D) -> (B, M, D)."""
    q = q.expand(k.shape[0], -1, -1)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, M or N, D / h)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
