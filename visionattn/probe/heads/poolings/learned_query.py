"""Poolings in which a learned query attends to the tokens (notation: see the package)."""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import AttentionPoolLatent, Mlp, trunc_normal_
from timm.models.cait import LayerScaleBlockClassAttn

from visionattn.blocks.efficient_probing import EfficientProbing
from visionattn.probe.heads.poolings.base import Pooling, attend, check_heads

__all__ = ["Aim", "Cae", "Cait", "Coca", "Jepa", "PatchProbing", "Siglip", "TokenProbing"]


class PatchProbing(EfficientProbing, Pooling):
    """`EfficientProbing` of the patches.

    Args:
        dim: Width D of the tokens.
        num_queries: Queries M.
        out_dim: Width of the vector, a multiple of M; D if None.
    """

    def __init__(self, dim: int, num_queries: int = 32, out_dim: int | None = None, device=None, dtype=None) -> None:
        super().__init__(dim, num_queries, out_dim, device=device, dtype=dtype)
        self.out_dim = self.value.out_features


class TokenProbing(PatchProbing):
    """`EfficientProbing` of the class token and the patches."""

    tokens = "all"


class Aim(Pooling):
    """AIM: y = MHA_h(u, W_K z, W_V z), z the tokens batch-normalised without gain or shift.

    Source: AIM, arXiv 2401.08541.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6, **dd)
        self.k = nn.Linear(dim, dim, bias=False, **dd)
        self.v = nn.Linear(dim, dim, bias=False, **dd)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        z = self.bn(tokens.flatten(0, 1)).view_as(tokens)
        return attend(self.query, self.k(z), self.v(z), self.num_heads).squeeze(1)


class Jepa(Pooling):
    """V-JEPA's attentive pooler: r = u + W_O MHA_h(W_Q u, W_K LN x, W_V LN x), y = r + MLP(LN r), biases everywhere.

    Source: V-JEPA, arXiv 2404.08471.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Small initial weights, and smaller ones at the end of residual branches."""
        trunc_normal_(self.query, std=0.02)
        for layer in (self.q, self.kv, self.proj, self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for layer in (self.proj, self.mlp.fc2):
            layer.weight.detach().div_(2**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        k, v = self.kv(self.norm1(tokens)).chunk(2, dim=-1)
        r = self.query + self.proj(attend(self.q(self.query), k, v, self.num_heads))
        return (r + self.mlp(self.norm2(r))).squeeze(1)


class Cae(Pooling):
    """CAE's attentive probe: y = W_O MHA_h(W_Q LN u, W_K LN' x, W_V LN'' x) + b.

    Source: CAE, arXiv 2202.03026.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.norm1_q = nn.LayerNorm(dim, **dd)
        self.norm1_k = nn.LayerNorm(dim, **dd)
        self.norm1_v = nn.LayerNorm(dim, **dd)
        # Unused: the norm before the MLP of CAE's block, which the probe does not have. It is part of the authors'
        # heads and of their parameter counts, and is required to load those heads strictly.
        self.norm2_cross = nn.LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.k = nn.Linear(dim, dim, bias=False, **dd)
        self.v = nn.Linear(dim, dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        q, k, v = self.q(self.norm1_q(self.query)), self.k(self.norm1_k(tokens)), self.v(self.norm1_v(tokens))
        return self.proj(attend(q, k, v, self.num_heads)).squeeze(1)


class Cait(Pooling):
    """CaiT's class attention: r = u + s W_O MHA_h(W_Q LN u, W_K LN [u; x], W_V LN [u; x]), y = LN(r + s' MLP(LN r)).

    s and s' scale each channel and start at 1e-5.

    Source: CaiT, arXiv 2103.17239.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.query = nn.Parameter(torch.empty(1, 1, dim, **dd))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.block = LayerScaleBlockClassAttn(dim, num_heads, qkv_bias=True, norm_layer=norm, init_values=1e-5, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        return self.norm(self.block(tokens, self.query.expand(tokens.shape[0], -1, -1))).squeeze(1)


class Coca(Pooling):
    """CoCa's pooler: y = W_O concat_i softmax(q_i (W_K x)^T / 8) W_V x, q = W_Q LN u_1 in 8 heads of 64.

    The heads share one key and one value head. CoCa learns many queries u_1, u_2, ... and uses the first as the vector
    of the image; queries do not attend to each other, so that the gradients of the others are zero.

    Source: CoCa, arXiv 2205.01917.

    Args:
        dim: Width D of the tokens.
        num_queries: Number of learned queries, of which only the first is used.
        num_heads: Heads, 64 wide.
    """

    def __init__(self, dim: int, num_queries: int = 196, num_heads: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_dim = dim
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(num_queries, dim, **dd))
        self.norm = nn.LayerNorm(dim, bias=False, **dd)
        self.q = nn.Linear(dim, num_heads * 64, bias=False, **dd)
        self.kv = nn.Linear(dim, 2 * 64, bias=False, **dd)
        self.proj = nn.Linear(num_heads * 64, dim, bias=False, **dd)
        nn.init.normal_(self.queries)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        q = self.q(self.norm(self.queries[:1])).unflatten(1, (self.num_heads, 64))  # (1, h, 64): heads are rows
        k, v = self.kv(tokens).chunk(2, dim=-1)  # (B, N, 64)
        return self.proj(attend(q, k, v).flatten(1))


class Siglip(Pooling):
    """SigLIP's attention pool: r = W_O MHA_h(W_Q u, W_K x, W_V x), y = r + MLP(r), biases everywhere.

    Source: SigLIP, arXiv 2303.15343, as timm's `AttentionPoolLatent`.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.pool = AttentionPoolLatent(dim, num_heads=num_heads, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        return self.pool(tokens)
