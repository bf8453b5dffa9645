r"""Cross-attention without parameters and without softmax.

    S   = SiLU(x) SiLU(z + e_k)^T                       z = beta context (B, M, C)
    S_ij <- 0 if S_ij is below its row's threshold      the value at index floor(ratio M) of the sorted row
    y   = alpha S (z + e_v)

Scores are neither scaled nor normalised: tokens must come from a normalisation layer. e_k and e_v (M, C) are learned
embeddings of keys and values, which all layers share in the source; here a layer has its own if `num_context_tokens` is
given.

Source: ADEM-VL, arXiv 2410.17779, and its authors' code (alpha 0.1, beta 0.01, ratio 0.1).

Deviations. The source has one head, which is the default; with more, each head mixes its own channels. Without a
context the tokens attend to themselves. There are no projections, so the weights of a transformer cannot be loaded.

Cost: 2 N M C multiply-accumulates; the N x M matrix is built.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer

__all__ = ["SiluCrossMixer", "silu_attention"]


def silu_attention(q: Tensor, k: Tensor, v: Tensor, ratio: float = 0.1, mask: Maybe = None) -> Tensor:
    """Weight values by SiLU(q) SiLU(k)^T without the lowest scores of each row (equations: see the module).

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, D).
        ratio: Fraction of the keys that each query ignores, in [0, 1).
        mask: Valid keys (B, M) bool.

    Returns:
        (B, heads, N, D).
    """
    scores = F.silu(q) @ F.silu(k).transpose(-2, -1)  # (B, heads, N, M)
    if mask is None:
        n = torch.full((1, 1, 1, 1), k.shape[2], dtype=torch.float64, device=q.device)
        ordered = scores
    else:
        n = mask.sum(dim=1)[:, None, None, None].double()
        ordered = scores.masked_fill(~mask[:, None, None], float("inf"))
    index = (ratio * n).long().expand(scores.shape[0], scores.shape[1], scores.shape[2], 1)
    threshold = ordered.sort(dim=-1).values.gather(-1, index)
    kept = scores >= threshold
    if mask is not None:
        kept = kept & mask[:, None, None]
    return (scores * kept) @ v


class SiluCrossMixer(Mixer):
    """Cross-attention by products of SiLUs (equations: see the module; other arguments: see `Mixer`).

    Args:
        num_context_tokens: Number of context tokens M, for embeddings of keys and values; None: no embeddings.
        ratio: Fraction of the keys that each query ignores, in [0, 1).
        alpha: Factor of the output.
        beta: Factor of the context.

    Raises:
        InputError: `ratio` is outside [0, 1); in `forward`, if the length of the context differs from the embeddings'.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    swappable = False
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        num_context_tokens: int | None = None,
        ratio: float = 0.1,
        alpha: float = 0.1,
        beta: float = 0.01,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if not 0 <= ratio < 1:
            raise InputError(f"ratio must be at least 0 and below 1; got {ratio}.")
        self.ratio, self.alpha, self.beta = float(ratio), float(alpha), float(beta)
        self.key_embedding = self.value_embedding = None
        if num_context_tokens is not None:
            shape = (1, num_context_tokens, dim)
            self.key_embedding = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.value_embedding = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            nn.init.normal_(self.key_embedding, std=0.02)

    def make_projections(self, dd: dict, qkv_bias: bool) -> None:
        """There are none."""

    def forward(self, x: Tensor, grid: Grid, context: Maybe = None, mask: Maybe = None) -> Tensor:
        """(B, P + H W, C) -> (B, P + H W, C)."""
        self.check(x, grid, context, mask)
        keys = values = (x if context is None else context) * self.beta
        key_embedding, value_embedding = self.key_embedding, self.value_embedding
        if key_embedding is not None and value_embedding is not None:
            if keys.shape[1] != key_embedding.shape[1]:
                raise InputError(
                    f"The embeddings are those of {key_embedding.shape[1]} context tokens; got {keys.shape[1]}."
                )
            keys, values = keys + key_embedding, values + value_embedding
        q, k, v = self.split_heads(x), self.split_heads(keys), self.split_heads(values)
        return silu_attention(q, k, v, self.ratio, mask).transpose(1, 2).flatten(2) * self.alpha

    @torch.jit.ignore
    def extra_parameters(self) -> int:
        """Number of all parameters: this mixer has no projections."""
        return sum(p.numel() for p in self.parameters())

    @torch.jit.ignore
    def macs(self, n: int, m: int | None = None) -> int:
        """Products for the scores and the values."""
        return 2 * n * (n if m is None else m) * self.dim
