r"""MatchAttention: attention to a small window around the current estimate of each pixel's match.

Tokens X (B, H, W, D) carry features and, as ordinary channels, positions that the attention itself updates. Each of h
heads of width c has a field rho (B, H, W, h, 2) in pixels, (x, y): query i at pixel p_i attends to the M = (2r + 2)^2
keys around the real-valued centre p_i + rho_i, by their negative L1 distance. All heads may share one field.

    s_im = -|q_i - k_m|_1 / sqrt(c)
    A_i  = BilinearSoftmax(s_i)        softmaxes over the four sub-windows of (2r + 1)^2 keys, interpolated bilinearly
    o_i  = sum over m of A_im v_m      (B, H, W, h c), heads concatenated

    self     q, k, v = W_q, W_k, W_v [X, n]     n (B, H, W, 1): 1 for non-occluded pixels, else 0
             Y = W_p o
    cross    q = W_q X, k, v = W_k, W_v X~      X~: tokens of the other view
             Y = W_p [SiLU(W_g X) * o, A]       with the h M elements of A, head by head: the position
                                                of a match in its window corrects the field

Equations of windows, clamping at borders and bilinear softmax: see `visionattn.kernels.match_attention`.

Source: MatchAttention, arXiv 2510.14260. No projection has a bias.

Deviations, and why. Each softmax subtracts the maximum of its own sub-window; with a shared one, as in the authors'
CUDA code, a key far above the rest takes the weight of sub-windows that do not contain it. Positions are float32 for
any dtype of the tokens, since in wide images the steps of half precision are as large as pixels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionattn.errors import InputError
from visionattn.kernels.match_attention import SIMILARITIES, bilinear_softmax

__all__ = ["MatchAttention", "MatchCrossAttention", "bilinear_softmax"]


class _Matching(nn.Module):
    """Projections of q, k and v, and the operator between them."""

    def __init__(self, dim: int, dim_attn: int, num_heads: int, radius: int, similarity: str, device, dtype) -> None:
        super().__init__()
        if min(dim, dim_attn, num_heads, radius) < 1 or dim_attn % num_heads:
            raise InputError(
                "Widths, num_heads and radius must be at least 1 and dim_attn divisible by num_heads; got dim "
                f"{dim}, dim_attn {dim_attn}, num_heads {num_heads} and radius {radius}."
            )
        if similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}; got {similarity!r}.")
        self.num_heads = num_heads
        self.radius = radius
        self.similarity = similarity
        self.q = nn.Linear(dim, dim_attn, bias=False, device=device, dtype=dtype)
        self.k = nn.Linear(dim, dim_attn, bias=False, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim_attn, bias=False, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Show the form in `print(model)`."""
        return f"heads={self.num_heads}, radius={self.radius}, similarity={self.similarity}"

    def attend(self, x: torch.Tensor, other: torch.Tensor, field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (B, H, W, h c) and the attention (B, H, W, h M) of queries from `x` to keys of `other`."""
        heads = (self.num_heads, self.q.weight.shape[0] // self.num_heads)
        q = self.q(x).unflatten(-1, heads)  # (B, H, W, h, c)
        k = self.k(other).unflatten(-1, heads)
        v = self.v(other).unflatten(-1, heads)
        out, attention = torch.ops.visionattn.match_attention(q, k, v, field, self.radius, self.similarity)
        return out.flatten(-2), attention.flatten(-2)


class MatchAttention(_Matching):
    """Self-attention of a map around its own fields (equations: see the module).

    Args:
        dim: Channels D of the tokens, positions included.
        dim_attn: Width h c of queries, keys and values; D if None.
        num_heads: Heads h.
        radius: Radius r of a sub-window.
        similarity: `"l1"`, the negative distance, or `"dot"`, the scalar product.

    Shape:
        x (B, H, W, D), field (B, H, W, h or 1, 2), visible (B, H, W, 1) -> (B, H, W, D), H and W at least 2r + 2.

    Raises:
        InputError: A size is less than 1, the width is not divisible by the heads, or the similarity is unknown.
    """

    def __init__(
        self,
        dim: int,
        dim_attn: int | None = None,
        num_heads: int = 4,
        radius: int = 1,
        similarity: str = "l1",
        device=None,
        dtype=None,
    ) -> None:
        dim_attn = dim if dim_attn is None else dim_attn
        super().__init__(dim + 1, dim_attn, num_heads, radius, similarity, device, dtype)
        self.proj = nn.Linear(dim_attn, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, field: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        x = torch.cat([x, visible], -1)
        out, _ = self.attend(x, x, field)
        return self.proj(out)


class MatchCrossAttention(_Matching):
    """Gated attention of a map to another one around fields (equations: see the module).

    Args:
        dim: Channels D of the tokens, positions included.
        dim_attn: Width h c of queries, keys and values; D if None.
        num_heads: Heads h.
        radius: Radius r of a sub-window.
        similarity: `"l1"`, the negative distance, or `"dot"`, the scalar product.

    Shape:
        x (B, H, W, D), other (B, H, W, D), field (B, H, W, h or 1, 2) -> (B, H, W, D), H and W at least 2r + 2.

    Raises:
        InputError: A size is less than 1, the width is not divisible by the heads, or the similarity is unknown.
    """

    def __init__(
        self,
        dim: int,
        dim_attn: int | None = None,
        num_heads: int = 4,
        radius: int = 1,
        similarity: str = "l1",
        device=None,
        dtype=None,
    ) -> None:
        dim_attn = dim if dim_attn is None else dim_attn
        super().__init__(dim, dim_attn, num_heads, radius, similarity, device, dtype)
        self.g = nn.Linear(dim, dim_attn, bias=False, device=device, dtype=dtype)
        shares = num_heads * (2 * radius + 2) ** 2
        self.proj = nn.Linear(dim_attn + shares, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, other: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        out, attention = self.attend(x, other, field)
        return self.proj(torch.cat([F.silu(self.g(x)) * out, attention], -1))
