r"""Halo attention: blocks of pixels attend to themselves and to a halo around them.

A map (B, C, H, W) is cut into blocks of b x b pixels. The queries of a block share one window of keys, the block and h
pixels around it, w = b + 2h pixels wide. Query i and key j of a window, at coordinates (i_y, i_x) in the block and
(j_y, j_x) in the window, have the logit

    q, k, v = W_q x, W_k x, W_v x              heads of width D (q, k) and Dv (v)
    l_ij    = q_i . k_j / sqrt(D) + q_i . U[w - 1 + j_y - i_y] + q_i . V[w - 1 + j_x - i_x]
    y_i     = sum over j of softmax_j(l_ij) v_j

with tables U, V of 2w - 1 rows that all heads share. h = 0 gives windows that do not overlap; a block as large as the
map gives global attention. With stride s, only every s-th query of each axis is computed; the window stays whole.

Sources: HaloNet, arXiv 2103.12731; the relative logits are those of arXiv 1904.09925. Parameters have the names and
layout of timm's `HaloAttn`.

Deviations, and why. Positions outside the map are masked (`border="mask"`); zero padding, as in the paper and timm,
gives them part of the softmax (`border="zero"`), so that a network's output there depends on how far the map was
padded. Rows of the tables are true offsets at every stride (`index="offset"`); timm counts subsampled queries
(`index="timm"`), which is the same at stride 1. Any size is accepted: maps are padded to whole blocks and cropped.
"""

import torch
import torch.nn as nn
from timm.layers import trunc_normal_

from visionattn.errors import InputError
from visionattn.kernels.halo_attention import BORDERS, INDICES

__all__ = ["HaloAttention", "RelativeTables"]


class RelativeTables(nn.Module):
    """Vectors of relative positions, one table per axis: `height_rel` and `width_rel`, (2w - 1, D)."""

    def __init__(self, window_size: int, dim_head: int, device=None, dtype=None) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window_size - 1, dim_head, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window_size - 1, dim_head, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise for relative logits of order 1 for queries of order 1."""
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)


class HaloAttention(nn.Module):
    """Blocked local attention with a halo and relative positions (equations: see the module).

    Args:
        dim: Channels C of the input.
        dim_out: Channels of the output, C if None; divided by `num_heads` it gives the heads' value width Dv.
        num_heads: Heads.
        dim_head: Width D of queries and keys; if None that of the values.
        block_size: Side b of a block in pixels.
        halo_size: Pixels h around it.
        stride: Subsampling s of the queries. If the block is not divisible by it, all queries are computed and the
            output is averaged over s x s pixels.
        qkv_bias: Give the projections a bias.
        avg_down: With a stride, average the output instead of subsampling queries, for any block size.
        scale_pos_embed: Divide the relative logits by sqrt(D) too, like those of the keys.
        border: Keys outside the map: `"mask"` excludes them, `"zero"` uses keys and values of zero.
        index: Rows of the relative tables: `"offset"` or `"timm"`.

    Shape:
        (B, C, H, W) -> (B, dim_out, H', W'), any H and W. H' = ceil(H / s), or floor(H / s) if averaged.

    Raises:
        InputError: The output is not divisible by the heads, a size is out of range, or a choice is unknown.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        border: str = "mask",
        index: str = "offset",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise InputError(f"dim_out ({dim_out}) must be divisible by num_heads ({num_heads}).")
        if min(block_size, stride) < 1 or halo_size < 0:
            raise InputError(
                f"block_size and stride must be at least 1 and halo_size at least 0; got {block_size}, {stride} and "
                f"{halo_size}."
            )
        if border not in BORDERS:
            raise InputError(f"border must be one of {', '.join(map(repr, BORDERS))}; got {border!r}.")
        if index not in INDICES:
            raise InputError(f"index must be one of {', '.join(map(repr, INDICES))}; got {index!r}.")
        average = stride > 1 and (avg_down or block_size % stride != 0)
        self.num_heads = num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.query_stride = 1 if average else stride
        self.border = border
        self.index = index
        self.dim_head_v = dim_out // num_heads
        self.dim_head = dim_head or self.dim_head_v
        self.table_scale = self.dim_head**-0.5 if scale_pos_embed else 1.0

        self.q = nn.Conv2d(dim, num_heads * self.dim_head, 1, stride=self.query_stride, bias=qkv_bias, **dd)
        # For each head D rows for keys, then Dv rows for values.
        self.kv = nn.Conv2d(dim, num_heads * (self.dim_head + self.dim_head_v), 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.dim_head, **dd)
        self.pool = nn.AvgPool2d(stride) if average else nn.Identity()
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise projections that keep the variance of their input."""
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_channels**-0.5)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.pos_embed.reset_parameters()

    def extra_repr(self) -> str:
        """Show the form in `print(model)`."""
        return (
            f"heads={self.num_heads}, block={self.block_size}, halo={self.halo_size}, border={self.border}, "
            f"index={self.index}"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, dim_out, H', W')."""
        q = self.q(x).unflatten(1, (self.num_heads, self.dim_head))  # (B, heads, D, H', W')
        kv = self.kv(x).unflatten(1, (self.num_heads, self.dim_head + self.dim_head_v))
        k, v = kv.split([self.dim_head, self.dim_head_v], dim=2)  # (B, heads, D or Dv, H, W)
        y = torch.ops.visionattn.halo_attention(
            q,
            k,
            v,
            self.pos_embed.height_rel * self.table_scale,
            self.pos_embed.width_rel * self.table_scale,
            self.block_size,
            self.halo_size,
            self.query_stride,
            self.border,
            self.index,
        )
        return self.pool(y.flatten(1, 2))
