r"""Softplus attention: scores without a temperature, normalised by their sum, sharpened by a power.

    a_ij = softplus(log D log n q_i . k_j / (|q_i| |k_j|)),   rows divided by their sum                LSSA
    a_ij <- max(n a_ij - o, 0)^p,                             rows divided by their sum again          LSSAR

n is the number of valid keys, D the width of a head; the offset o is 1: keys below the average weight get exactly 0.
The factor log n replaces a learned or fixed temperature and adapts to the resolution. The source uses the power 3 at
the trained size and 15 for larger inputs.

Source: arXiv 2501.13428.

Deviations, and why. There is no causal mask. Re-weighted rows are divided by their maximum before the power and
computed in float32 at least: (n a - 1)^15 overflows half precision for a weight of 3.1 times the mean. A row whose
weights are all equal would become zero and is left unchanged.

Cost: that of softmax attention; the N x N matrix is built.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer

__all__ = ["ReweightedSoftplusMixer", "SoftplusMixer", "softplus_weights"]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32. A function, so that `torch.fx` does not trace it."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


torch.fx.wrap("at_least_float32")


def softplus_weights(q: Tensor, k: Tensor, power: float | None = None, mask: Maybe = None) -> Tensor:
    """Attention weights (equations: see the module).

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        power: Power p of the re-weighting; None: no re-weighting.
        mask: Valid keys (B, M) bool.

    Returns:
        (B, heads, N, M), rows sum to 1; float32 if q has half precision.
    """
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if mask is None:
        n = torch.full((1, 1, 1, 1), k.shape[2], dtype=q.dtype, device=q.device)
    else:
        n = mask.sum(dim=1)[:, None, None, None].to(q.dtype)
    scores = q @ k.transpose(-2, -1) * (math.log(q.shape[-1]) * n.clamp(min=1).log())
    weights, n = F.softplus(at_least_float32(scores)), at_least_float32(n)
    if mask is not None:
        weights = weights * mask[:, None, None].to(weights.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    if power is not None:
        sharp = (n * weights - 1).relu()
        largest = sharp.amax(dim=-1, keepdim=True)
        sharp = (sharp / largest.clamp(min=1e-30)).pow(power)
        sharp = sharp / sharp.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        weights = torch.where(largest > 0, sharp, weights)
    return weights


class SoftplusMixer(Mixer):
    """Attention with softplus scores (equations: see the module; other arguments: see `Mixer`).

    Args:
        power: Power p of the re-weighting; None: no re-weighting (LSSA).

    Raises:
        InputError: `power` is not positive.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        power: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if power is not None and power <= 0:
            raise InputError(f"power must be positive or None; got {power}.")
        self.power = None if power is None else float(power)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Sum the values with softplus weights."""
        return softplus_weights(q, k, self.power, mask).to(v.dtype) @ v


class ReweightedSoftplusMixer(SoftplusMixer):
    """LSSAR: softplus scores sharpened by a power (arguments: see `SoftplusMixer`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        power: float = 3.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, power, device=device, dtype=dtype)
