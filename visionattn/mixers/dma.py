r"""Dynamic mask attention: each head keeps the keys that score highest by their values.

    b_j = A_g softplus(W_dt v_j)_g          one bias per key and head g; v_j: the values of all heads of token j
    K_g = the w keys with the largest b     the same for all queries of a head
    y_i = sum over j in K_g of softmax_j(q_i . k_j / sqrt(D) + b_j) v_j

The selection itself has no gradient; A and W_dt learn through the bias of the keys that are kept. `importance` returns
b, a map of how much each token matters, at no further cost.

Source: Dynamic Mask Attention, arXiv 2508.02124, in the form of its authors' code, which adds A softplus(.) instead of
exp(A softplus(.)).

Deviations, and why. The mask is not causal. A starts at 0.01 instead of 0, where all keys would have the same bias and
the selection would be arbitrary. Keys are selected from the prefix tokens too.

Cost: 2 N w C + M C heads multiply-accumulates; no N x N matrix is built.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, softmax_attention

__all__ = ["DynamicMaskMixer", "dynamic_mask_attention"]


def dynamic_mask_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: int, mask: Maybe = None) -> Tensor:
    """Attention to the keys with the largest bias (equations: see the module).

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, D).
        bias: Bias per key, (B, heads, M).
        keep: Number w of keys that are kept, at most M.
        mask: Valid keys (B, M) bool.

    Returns:
        (B, heads, N, D).
    """
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None], float("-inf"))
    kept = bias.detach().topk(keep, dim=-1).indices.sort(dim=-1).values  # (B, heads, w), in the order of the tokens
    index = kept[..., None].expand(-1, -1, -1, k.shape[-1])
    return softmax_attention(q, k.gather(2, index), v.gather(2, index), bias=bias.gather(2, kept)[:, :, None])


class DynamicMaskMixer(Mixer):
    """Attention to the keys that a head selects by their values (see the module; other arguments: see `Mixer`).

    Args:
        reduction: Each head keeps w = ceil(M / reduction) of M keys.

    Raises:
        InputError: `reduction` is below 1.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    limit = "reduction = 1 and A = 0"
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        reduction: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if reduction < 1:
            raise InputError(f"reduction must be at least 1; got {reduction}.")
        self.reduction = reduction
        self.A = nn.Parameter(torch.full((num_heads,), 0.01, device=device, dtype=dtype))
        self.dt_proj = nn.Linear(dim, num_heads, bias=qkv_bias, device=device, dtype=dtype)

    def bias(self, v: Tensor) -> Tensor:
        """Values (B, heads, M, D) -> bias of each key (B, heads, M)."""
        values = v.transpose(2, 3).flatten(1, 2)  # (B, C, M)
        step = self.dt_proj.weight @ values
        if self.dt_proj.bias is not None:
            step = step + self.dt_proj.bias[:, None]
        return self.A[:, None] * F.softplus(step)

    @torch.jit.ignore
    def importance(self, x: Tensor) -> Tensor:
        """Importance of each token to each head: (B, M, C) -> (B, heads, M)."""
        return self.bias(self.project(x, None)[2])

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Select keys and attend to them."""
        keep = (k.shape[2] + self.reduction - 1) // self.reduction
        return dynamic_mask_attention(q, k, v, self.bias(v), keep, mask)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention to the selected keys, and the bias of all keys."""
        return 2 * n * -(-m // self.reduction) * self.dim + m * self.dim * self.num_heads
