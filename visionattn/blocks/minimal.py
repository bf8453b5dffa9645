r"""Minimal attention: how much of a transformer block is needed?

With tokens X of shape (B, N, C), H heads of width D = C / H, each head h mixes tokens by a similarity S_h:

    A_h = softmax(S_h)                       (B, N, N), rows sum to 1
    Y   = concat_h(A_h V_h) W_O              (B, N, C)

`similarity` selects S_h; a projection that is not needed is neither stored nor computed:

    pair        S_h = X W_Q,h (X W_K,h)^T / sqrt(D)     2 C^2 parameters
    shared      the same with W_K = W_Q                   C^2, positive semi-definite
    collapsed   S_h = X W_h X^T / sqrt(C)               H C^2: smaller than the pair only for H = 1
    symmetric   S_h = X T_h T_h^T X^T / sqrt(C)         H C (C + 1) / 2, T_h lower triangular, positive semi-definite

`values` selects what is mixed:

    projected   V = X W_V, output projection W_O        2 C^2 parameters
    identity    V_h = the h-th slice of X's channels, no W_O: tokens are averaged, never transformed
    shaped      as identity, with A_h replaced by alpha_h I + beta_h A_h - gamma_h 11^T / N  (3 H parameters)

The surrounding block may omit the MLP.

Sources: "Reducing the Transformer Architecture to a Minimum", arXiv 2410.13732 (no MLP, collapsed and symmetric
similarity, no values); "Simplifying Transformer Blocks", arXiv 2311.01906 (shaped attention).

Deviations, and why. Scores are scaled by the square root of the width that they sum over, and T is initialised so that
a normalised token's score with itself is 1 on average: drawn from N(0, 1) it would be sqrt(C) (C + 1) / 2, the softmax
one-hot and the network untrainable. The paper's collapsed and symmetric forms have one head; more are allowed here at
the cost above. Shaped attention starts with W_Q = 0, so that alpha = beta = gamma = 1 give the identity, and
needs no skip; the source's value matrix in the first layer and its gain on the MLP branch are omitted.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, trunc_normal_

from visionattn.errors import InputError

__all__ = ["MinimalAttention", "MinimalBlock"]

SIMILARITIES = ("pair", "shared", "collapsed", "symmetric")
VALUES = ("projected", "identity", "shaped")


class MinimalAttention(nn.Module):
    """Attention whose similarity and values are reduced to what a task needs (equations: see the module).

    Args:
        num_heads: Heads H. C must be divisible by it.
        num_heads: Heads H. C must be a multiple of it.
        similarity: `"pair"`, `"shared"`, `"collapsed"` or `"symmetric"`.
        values: `"projected"`, `"identity"` or `"shaped"`.
        bias: Add a bias to the linear projections. The triangular T has none.

    Shape:
        (B, N, C) -> (B, N, C), any N >= 1.

    Raises:
        InputError: A form is unknown, or `dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        similarity: str = "pair",
        values: str = "projected",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}; got {similarity!r}.")
        if values not in VALUES:
            raise InputError(f"values must be one of {', '.join(map(repr, VALUES))}; got {values!r}.")
        if dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads}).")
        self.dim = dim
        self.num_heads = num_heads
        self.similarity = similarity
        self.values = values

        # Widths of q, k and v inside the one projection; 0 where X itself, q or T replaces it.
        self.widths = [
            {"pair": dim, "shared": dim, "collapsed": num_heads * dim, "symmetric": 0}[similarity],
            dim if similarity == "pair" else 0,
            dim if values == "projected" else 0,
        ]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=bias, **dd) if sum(self.widths) else None
        symmetric, shaped = similarity == "symmetric", values == "shaped"
        self.triangle = nn.Parameter(torch.empty(num_heads, dim * (dim + 1) // 2, **dd)) if symmetric else None
        place = torch.empty(dim * dim, dtype=torch.long, device=device) if symmetric else None
        self.register_buffer("place", place, persistent=False)
        self.init_non_persistent_buffers()
        self.proj = nn.Linear(dim, dim, bias=bias, **dd) if values == "projected" else nn.Identity()
        self.gains = nn.Parameter(torch.empty(3, num_heads, 1, 1, **dd)) if shaped else None  # alpha, beta, gamma
        self.init_weights()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        # The indices are not saved: after `to_empty` or on the meta device they are undefined.
        if self.place is not None:
            if self.place.is_meta and state_dict:
                device = next(iter(state_dict.values())).device
                self.register_buffer("place", torch.empty_like(self.place, device=device), persistent=False)
            self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise for scores of order 1: of any two tokens, or of a token with itself in the semi-definite forms."""
        unit = self.dim**-0.5  # keeps the variance of normalised tokens
        if self.qkv is not None:
            trunc_normal_(self.qkv.weight, std=unit)
            queries = self.qkv.weight.detach()[: self.widths[0]]
            if self.similarity == "shared":
                queries.mul_((self.dim // self.num_heads) ** -0.25)
            if self.values == "shaped":
                queries.zero_()
            if self.qkv.bias is not None:
                nn.init.zeros_(self.qkv.bias)
        if self.triangle is not None:
            nn.init.normal_(self.triangle, std=(2 / (self.dim**0.5 * (self.dim + 1))) ** 0.5)
        if self.gains is not None:
            nn.init.ones_(self.gains)
        if isinstance(self.proj, nn.Linear):
            trunc_normal_(self.proj.weight, std=unit)
            if self.proj.bias is not None:
                nn.init.zeros_(self.proj.bias)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Index in `triangle` of each entry of T; entries above the diagonal point one past its end, at a zero."""
        if self.place is not None:
            index = torch.arange(self.dim, device=self.place.device)
            row, column = index[:, None], index[None, :]
            place = torch.where(column <= row, row * (row + 1) // 2 + column, self.triangle.shape[1])
            self.place.copy_(place.flatten())

    def extra_repr(self) -> str:
        """Show the form in `print(model)`."""
        return f"{self.dim}, heads={self.num_heads}, similarity={self.similarity}, values={self.values}"

    def triangular(self) -> torch.Tensor:
        """The H matrices T_h concatenated, (C, H C), rows filled from the stored elements in order."""
        full = F.pad(self.triangle, (0, 1)).index_select(1, self.place)
        return full.view(self.num_heads, self.dim, self.dim).transpose(0, 1).flatten(1)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, H D) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, H, N, width); equal ones are computed once."""
        q, k, v = x, x, x
        if self.qkv is not None:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        if self.triangle is not None:
            q = x @ self.triangular()
        q = self.split_heads(q)
        if self.similarity == "pair":
            k = self.split_heads(k)
        elif self.similarity == "collapsed":
            k = x.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        else:
            k = q
        v = self.split_heads(v if self.values == "projected" else x)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens: (B, N, C) -> (B, N, C)."""
        q, k, v = self.project(x)  # (B, H, N, D or C), v (B, H, N, D)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.gains is not None:
            alpha, beta, gamma = self.gains.unbind(0)  # (H, 1, 1)
            y = alpha * v + beta * y - gamma * v.mean(dim=2, keepdim=True)
        return self.proj(y.transpose(1, 2).flatten(2))

    @torch.jit.ignore
    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The mixing matrices (B, H, N, N) that `forward` applies without building them."""
        q, k, _ = self.project(x)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        if self.gains is not None:
            alpha, beta, gamma = self.gains.unbind(0)
            identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            weights = alpha * identity + beta * weights - gamma / x.shape[1]
        return weights


class MinimalBlock(nn.Module):
    """Pre-norm residual block: X + attention(norm(X)), then X + MLP(norm(X)) if there is an MLP.

    Shaped attention contains the identity itself, so its skip is omitted (arXiv 2311.01906).

    Args:
        dim: Channels C of the tokens.
        num_heads: Heads of the attention.
        similarity: See `MinimalAttention`.
        values: See `MinimalAttention`.
        mlp_ratio: Hidden width of the MLP as a multiple of C; 0 omits the MLP and its norm.
        drop_path: Probability of dropping a residual branch in training.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        similarity: str = "pair",
        values: str = "projected",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.skip = values != "shaped"
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = MinimalAttention(dim, num_heads, similarity, values, **dd)
        self.norm2 = LayerNorm(dim, **dd) if mlp_ratio else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if mlp_ratio else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        mixed = self.attn(self.norm1(x))
        x = x + self.drop_path(mixed) if self.skip else mixed
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x
