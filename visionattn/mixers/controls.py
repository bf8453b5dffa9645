r"""Controls: baselines that show what a mechanism adds.

    softmax        y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j
    identity       y_i = v_i                          no mixing: what the projections alone achieve
    mean           y_i = mean_j v_j                   one vector for all queries
    pool3x3        y_i = mean of v over the 3 x 3 neighbourhood - v_i   PoolFormer's mixer; prefix tokens: 0
    softmax_conv   softmax attention + depthwise 3 x 3 convolution of the values

`pool3x3` ignores neighbours outside the grid. `softmax_conv` is the control for agent attention, which adds the same
convolution; the convolution has a bias and does not reach prefix tokens.

Sources: MetaFormer, arXiv 2111.11418 and 2210.13452 (pooling, identity); Agent Attention, arXiv 2312.08874 (the
convolution).

Deviation. MetaFormer's mixers have no projections. Here they keep those of all mixers, so that a comparison at equal
parameters isolates the mixing; the query and key projections then exist but are not used.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from visionattn.mixers.core import Grid, GridConvolution, Maybe, Mixer, from_map, masked_mean, softmax_attention, to_map

__all__ = ["IdentityMixer", "MeanMixer", "Pool3x3Mixer", "SoftmaxConvMixer", "SoftmaxMixer"]


class SoftmaxMixer(Mixer):
    """Softmax attention (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "bias", "script", "onnx"})
    limit = "it is softmax attention"
    equivariant = True

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend to all valid keys."""
        return softmax_attention(q, k, v, mask, bias)


class IdentityMixer(Mixer):
    """No mixing: the value of each token (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "any_grid", "script", "onnx"})
    equivariant = True

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Return the values."""
        return v

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """No operations."""
        return 0


class MeanMixer(Mixer):
    """Mean of all values, the same for every query (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    limit = "queries or keys of zero"
    equivariant = True

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Average the values of valid keys."""
        return masked_mean(v, mask).expand_as(q)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """One addition per value."""
        return m * self.dim


class Pool3x3Mixer(Mixer):
    """Average of the 3 x 3 neighbourhood minus the token itself (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "any_grid", "script", "onnx"})

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Pool the values of the grid."""
        prefix = v.shape[2] - grid[0] * grid[1]
        values = to_map(v[:, :, prefix:], grid)
        pooled = F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False) - values
        return from_map(pooled, self.num_heads, prefix)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Nine additions per value."""
        return 9 * n * self.dim


class SoftmaxConvMixer(Mixer):
    """Softmax attention plus a depthwise convolution of the values (equations: see the module).

    The convolution starts at zero, so that the mixer starts as softmax attention. Arguments: see `Mixer`.
    """

    supports = frozenset({"prefix", "any_grid", "mask", "bias", "script", "onnx"})
    limit = "a convolution of zero, as at the start"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        self.dwc = GridConvolution(dim, device=device, dtype=dtype)
        for parameter in self.dwc.parameters():
            nn.init.zeros_(parameter)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend, and add the convolved values."""
        return softmax_attention(q, k, v, mask, bias) + self.dwc(v, grid)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention, and nine products per value."""
        return 2 * n * m * self.dim + 9 * n * self.dim
