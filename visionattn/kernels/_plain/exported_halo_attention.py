"""The form of `visionattn.kernels.halo_attention` for exported graphs, whose runtimes execute one operation at a time.

It computes the same as the definition, with operations that are cheap in such runtimes:

- The relative logits are h_i,jy + v_i,jx, one value for each row and column of the window. One product with a constant
  matrix of zeros and ones expands both to all keys; runtimes broadcast runs of w elements slowly.
- No key has a logit of -inf: in some runtimes its exponential becomes a denormal number, many times slower than
  others. A key outside the map takes the logit of the nearest one inside, and is excluded from the sums:

      o_i = sum over j of p_ij m_j v_j / sum over j of p_ij m_j      m_j: 1 inside the map, 0 outside

  These sums come from one product with values that have m as an additional channel.
- Windows are rows of a table of pixels with heads before pixels, so that nothing is transposed afterwards.
- No tensor has more than five axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["halo_attention_exported"]


def halo_attention_exported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    border: str,
    index: str,
) -> Tensor:
    """The output, (B, heads, Dv, H', W')."""
    (B, heads, D, H, W), Dv = k.shape, v.shape[2]
    b, w, bq = block_size, block_size + 2 * halo_size, block_size // stride
    ny, nx = (H + b - 1) // b, (W + b - 1) // b
    N, masked = B * heads, border == "mask"
    first_y = torch.arange(ny, device=q.device).unsqueeze(1) * b - halo_size
    first_x = torch.arange(nx, device=q.device).unsqueeze(1) * b - halo_size
    in_window = torch.arange(w, device=q.device)
    y, x = first_y + in_window, first_x + in_window  # (ny, w), (nx, w), in the map
    near_y, near_x = y.clamp(0, H - 1), x.clamp(0, W - 1)

    def table_rows(table: Tensor, first: Tensor, keys: Tensor) -> Tensor:
        """Rows of a relative table for each row or column of queries, (n bq, w, D)."""
        i = torch.arange(bq, device=q.device).unsqueeze(1) * (stride if index == "offset" else 1)
        rows = (w - 1 + (keys - first).unsqueeze(1) - i).flatten()
        return table.index_select(0, rows).view(-1, w, D)

    def blocks(rows: Tensor) -> Tensor:
        """Order (N, H', W', C) by blocks, (N ny nx, bq bq, C)."""
        rows = rows.reshape(N * ny, bq, nx, -1).transpose(1, 2)
        return rows.reshape(N * ny * nx, bq * bq, -1)

    def windows(pixels: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table, (N, C, pixels) -> (N ny nx, w w, C)."""
        return pixels.transpose(1, 2).index_select(1, rows).view(N * ny * nx, w * w, -1)

    inside = (near_y[:, None, :, None] * W + near_x[None, :, None, :]).flatten()
    is_outside = torch.logical_or((y != near_y)[:, None, :, None], (x != near_x)[None, :, None, :]).flatten()
    or_zero = (inside + 1).masked_fill(is_outside, 0)  # in tables that begin with a row of zeros
    keys, values = k.reshape(N, D, H * W), v.reshape(N, Dv, H * W)
    if masked:
        keys, values = windows(keys, inside), F.pad(values, (0, 0, 0, 1), value=1.0)
    else:
        keys = windows(F.pad(keys, (1, 0)), or_zero)
    values = windows(F.pad(values, (1, 0)), or_zero)

    q = F.pad(q.flatten(1, 2), (0, nx * bq - q.shape[4], 0, ny * bq - q.shape[3]))
    q = q.reshape(N, D, ny * bq * nx * bq).transpose(1, 2).reshape(N, ny * bq, nx * bq, D)
    height = table_rows(height_rel, first_y, near_y if masked else y)  # (H', w, D)
    width = table_rows(width_rel, first_x, near_x if masked else x)
    height = q @ height.transpose(1, 2)  # (N, H', W', w)
    width = (q.transpose(1, 2) @ width.transpose(1, 2)).transpose(1, 2)
    one = (in_window.unsqueeze(1) == in_window).to(q.dtype)  # not torch.eye, for which LiteRT has no operation
    spread = torch.cat([one.repeat_interleave(w, 1), one.repeat(1, w)])  # (2 w, w w)
    relative = blocks(torch.cat([height, width], -1)) @ spread
    p = ((blocks(q) * D**-0.5) @ keys.transpose(1, 2) + relative).softmax(-1)
    out = p @ values  # (N ny nx, bq bq, Dv), and with a mask the sum of the weights
    if masked:
        out = out[..., :Dv] / out[..., Dv:]
    out = out.reshape(N * ny, nx, bq, bq * Dv).transpose(1, 2).reshape(N, ny * bq * nx * bq, Dv).transpose(1, 2)
    out = out.reshape(B, heads, Dv, ny * bq, nx * bq)
    return out[..., : (H + stride - 1) // stride, : (W + stride - 1) // stride]
