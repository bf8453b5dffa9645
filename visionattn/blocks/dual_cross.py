r"""Dual cross-attention: a class token attends to the whole image again, and training adds keys of a second image.

Tokens X (B, N + 1, C), class token first. Besides self-attention (SA), S = softmax(Q K^T / sqrt(d)) of each head:

    PWCA   softmax(Q_1 [K_1; K_2]^T / sqrt(d)) [V_1; V_2]      pair-wise: queries of an image, keys and values of it
                                                               and of another image together, with the weights of SA;
                                                               in training only, the target is the first image's
    r      = e_0^T S~_L S~_{L-1} .. S~_1,  S~ = (mean over heads of S + I) / 2        (B, N + 1)
                                                               roll-out: contribution of each token to the class token
    GLCA   softmax(Q^l K^T / sqrt(d)) V                        global-local: the class token and the R patches with the
                                                               highest r are queries, all tokens are keys

GLCA is one pre-norm block with its own weights after the last block of SA. Each of the three has a loss, weighted
by learned w:

    L = sum over i of (exp(-w_i) L_i + w_i) / 2

Sources: DCAL, arXiv 2205.02151; roll-out, arXiv 2005.00928; the weights are those of arXiv 1705.07115 as in FairMOT,
arXiv 2004.01888. DCAL has no public code.

Deviations, and why. Only row 0 of the roll-out is needed, so it is computed as L products of a vector and a matrix,
without an N x N product. It has no gradient. The class token always is a query of GLCA, since it is the output.
The second image of a pair also passes through PWCA, as the first image of another pair: the paper specifies neither.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp

from visionattn.errors import InputError

__all__ = [
    "DualCrossAttention",
    "DualCrossBlock",
    "GlobalLocalCrossAttention",
    "UncertaintyWeighting",
    "roll_out",
    "select_local",
]


class DualCrossAttention(nn.Module):
    """Self-attention whose weights also serve pair-wise cross-attention (equations: see the module).

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads. C must be divisible by it.
        qkv_bias: Give queries, keys and values a bias.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        InputError: `dim` is not divisible by `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads}).")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, heads, N, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, y: torch.Tensor) -> torch.Tensor:
        """(B, heads, N, d) -> (B, N, C)."""
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention: (B, N, C) -> (B, N, C)."""
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def pairwise(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """PWCA: x (B, N, C), other (B, M, C) -> (B, N, C)."""
        (q, k, v), (_, k2, v2) = self.split(x), self.split(other)
        return self.merge(F.scaled_dot_product_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2)))

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of S over heads, (B, N, N), without gradient."""
        q, k, _ = self.split(x.detach())
        scores = q.detach() @ k.detach().transpose(-2, -1) * q.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)


class DualCrossBlock(nn.Module):
    """Pre-norm transformer block of self-attention or, with the same weights, pair-wise cross-attention.

    Parameter names are those of timm's ViT.

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads. C must be divisible by it.
        mlp_ratio: Hidden width of the MLP as a multiple of C.
        qkv_bias: Give queries, keys and values a bias.
        drop_path: Probability of dropping a residual branch in training.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = DualCrossAttention(dim, num_heads, qkv_bias, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def pairwise(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """PWCA, then the MLP: x (B, N, C), other (B, M, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn.pairwise(self.norm1(x), self.norm1(other)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of S over heads for the block's input, (B, N, N), without gradient."""
        return self.attn.attention_map(self.norm1(x))


class GlobalLocalCrossAttention(nn.Module):
    """GLCA: a pre-norm block with some tokens as queries and all as keys (equations: see the module).

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads. C must be divisible by it.
        mlp_ratio: Hidden width of the MLP as a multiple of C.
        drop_path: Probability of dropping a residual branch in training.

    Shape:
        local (B, M, C), tokens (B, N, C) -> (B, M, C).

    Raises:
        InputError: `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads}).")
        self.num_heads = num_heads
        self.norm1 = LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, local: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Queries `local` (B, M, C) and tokens (B, N, C) -> (B, M, C)."""
        q = self.q(self.norm1(local)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, M, d)
        k, v = self.kv(self.norm1(tokens)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        local = local + self.drop_path(self.proj(y.transpose(1, 2).flatten(2)))
        return local + self.drop_path(self.mlp(self.norm2(local)))


def roll_out(maps: list[torch.Tensor]) -> torch.Tensor:
    """Contribution of each token to the first token over layers of self-attention.

    Args:
        maps: (B, N, N) per layer, the first layer first, rows that sum to 1.

    Returns:
        r, (B, N), which sums to 1.
    """
    last = maps[len(maps) - 1][:, :1]
    r = 0.5 * torch.cat([last[..., :1] + 1, last[..., 1:]], -1)
    for layer in range(len(maps) - 2, -1, -1):
        r = 0.5 * (r @ maps[layer] + r)
    return r.squeeze(1)


def select_local(tokens: torch.Tensor, relevance: torch.Tensor, count: int) -> torch.Tensor:
    """The first token, then those of the others with the highest relevance.

    Args:
        tokens: (B, N, C).
        relevance: (B, N), such as the output of `roll_out`; the value of the first token is ignored.
        count: Number R < N of other tokens.

    Returns:
        (B, 1 + R, C), the most relevant first.
    """
    index = relevance[:, 1:].topk(count, dim=1).indices + 1  # (B, R)
    return torch.cat([tokens[:, :1], tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))], 1)


class UncertaintyWeighting(nn.Module):
    """Sum of losses with learned weights: sum over i of (exp(-w_i) L_i + w_i) / 2, w is initialised to 0.

    Args:
        num_losses: Losses n.

    Shape:
        (n,) -> ().
    """

    def __init__(self, num_losses: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_losses, device=device, dtype=dtype))

    def forward(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (n,) -> their weighted sum."""
        return 0.5 * ((-self.weight).exp() * losses + self.weight).sum()
