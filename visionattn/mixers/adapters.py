r"""Blocks of this package as mixers, so that they can be compared and swapped.

    halo        blocks of b x b tokens attend to themselves and to a margin of h tokens, with relative positions:
                `visionattn.blocks.HaloAttention` with the projections of all mixers
    tied        similarity x W W^T x^T: `MinimalAttention(similarity="shared")`
    collapsed   similarity x W x^T: `MinimalAttention(similarity="collapsed")`
    symmetric   similarity x T T^T x^T: `MinimalAttention(similarity="symmetric")`
    gate        y = W_o (h + v) (sigmoid(h) - 1/2) with h = conv3x3(v): SPAN's parameter-free gate over a depthwise
                convolution

Sources: those of `visionattn.blocks.halo`, `minimal` and `span`.

Deviations. `halo` starts with relative tables of zero, which makes it softmax attention over its window. In SPAN full
convolutions precede the gate; here a depthwise one does the mixing, so that the gate has no more parameters than a 3 x
3 kernel for each channel.
"""

import torch
import torch.nn as nn
from torch import Tensor

from visionattn.blocks.halo import RelativeTables
from visionattn.blocks.minimal import MinimalAttention
from visionattn.errors import InputError
from visionattn.mixers.core import Grid, GridConvolution, Maybe, Mixer, from_map, softmax_attention, to_map

__all__ = ["CollapsedMixer", "GateMixer", "HaloMixer", "SymmetricMixer", "TiedMixer"]


class HaloMixer(Mixer):
    """Attention of blocks of tokens to their neighbourhood (see the module; other arguments: see `Mixer`).

    Args:
        block_size: Side b of a block, in tokens.
        halo_size: Width h of the margin around it, in tokens.

    Raises:
        InputError: `block_size` is below 1, or `halo_size` is negative.
    """

    supports = frozenset({"any_grid", "script", "onnx"})
    limit = "one block as large as the grid, tables of zero as at the start"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        block_size: int = 7,
        halo_size: int = 3,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if block_size < 1 or halo_size < 0:
            raise InputError(
                f"block_size must be at least 1 and halo_size at least 0; got {block_size} and {halo_size}."
            )
        self.block_size, self.halo_size = block_size, halo_size
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.dim_head, device=device, dtype=dtype)
        for table in self.pos_embed.parameters():
            nn.init.zeros_(table)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend to the block and its halo."""
        height, width = grid
        q, k, v = [t.transpose(2, 3).unflatten(-1, (height, width)) for t in (q, k, v)]  # (B, heads, D, H, W)
        y = torch.ops.visionattn.halo_attention(
            q,
            k,
            v,
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            self.block_size,
            self.halo_size,
            1,
            "mask",
            "offset",
        )
        return y.flatten(3).transpose(2, 3)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention to the keys of one window per query, and the relative logits."""
        window = self.block_size + 2 * self.halo_size
        return 2 * n * min(window**2, m) * self.dim + 2 * n * window * self.dim


class TiedMixer(Mixer):
    """Attention whose queries equal its keys (see the module; arguments: see `Mixer`)."""

    supports = frozenset({"prefix", "mask", "any_grid", "script", "onnx"})
    swappable = False
    equivariant = True
    similarity = "shared"

    def make_projections(self, dd: dict, qkv_bias: bool) -> None:
        """Create the block, which holds the projections."""
        self.attn = MinimalAttention(self.dim, self.num_heads, self.similarity, bias=qkv_bias, **dd)

    def forward(self, x: Tensor, grid: Grid, context: Maybe = None, mask: Maybe = None) -> Tensor:
        """(B, P + H W, C) -> (B, P + H W, C)."""
        self.check(x, grid, context, mask)
        q, k, v = self.attn.project(x)
        y = softmax_attention(q, k, v, mask)
        return self.attn.proj(y.transpose(1, 2).flatten(2))

    @torch.jit.ignore
    def macs(self, n: int, m: int | None = None) -> int:
        """The remaining projections, and attention with queries of their actual width."""
        wide = self.similarity != "shared"
        queries = (self.num_heads if wide else 1) * self.dim
        return n * self.dim * (queries + 2 * self.dim) + n * n * (queries + self.dim)


class CollapsedMixer(TiedMixer):
    """Attention with one matrix for queries and keys (see the module; arguments: see `Mixer`)."""

    similarity = "collapsed"


class SymmetricMixer(TiedMixer):
    """Attention with a positive semi-definite similarity (see the module; arguments: see `Mixer`)."""

    similarity = "symmetric"


class GateMixer(Mixer):
    """SPAN's symmetric gate over convolved values (see the module; arguments: see `Mixer`).

    The query and key projections exist but are not used. Prefix tokens are not supported: the gate does not mix them.
    """

    supports = frozenset({"any_grid", "script", "onnx"})

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

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Convolve and gate."""
        h = to_map(self.dwc(v, grid), grid)
        return from_map(torch.ops.visionattn.symmetric_gate(h, to_map(v, grid)), self.num_heads, 0)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Nine products and the gate for each value."""
        return 10 * n * self.dim
