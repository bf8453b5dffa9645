r"""Patch-wise comparison of two images: late interaction, and a transformer that reads both and returns one logit.

With the patches a_1 .. a_N of one image and b_1 .. b_M of the other, standardised by channel,

    late(a, b)  = (1 / N) \sum_n  max_m  cos(a_n, b_m)                        without parameters (ColBERT, 2004.12832)
    z           = blocks([u ; W a + s_1 ; W b + s_2])                         u: class token, s: embedding of the side
    logit(a, b) = w_h . LN(z_0)  +  g (late(a, b) + late(b, a)) / 2  +  c

w_h starts at 0, so that an untrained pair encoder ranks like late interaction, its control. Each pair costs a pass over
N + M + 1 tokens, so a pair encoder is meant to re-rank the nearest images of a search.

Source: the cross-encoder of Trans-Encoder, arXiv 2109.13059, applied to patches; late interaction is our addition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PairEncoder", "late_interaction"]

HEAD_WIDTH = 16


def late_interaction(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean over the first patches (..., N, D) of the highest cosine with the second patches (..., M, D): (...)."""
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).transpose(-2, -1)
    return cosines.amax(dim=-1).mean(dim=-1)


class PairEncoder(nn.Module):
    """Similarity of two images from the patches of both (equations: see the module).

    Args:
        dim: Channels D of a patch.
        width: Hidden channels, divisible by 16, the width of a head.
        depth: Number of transformer blocks.

    Attributes:
        mean: Mean of each channel over patches, (D,).
        std: Standard deviation of each channel, (D,).

    Shape:
        (B, N, D) and (B, M, D) -> logits (B,).

    Raises:
        ValueError: `width` is not divisible by 16.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, dim: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        if width < HEAD_WIDTH or width % HEAD_WIDTH:
            raise ValueError(f"width must be divisible by {HEAD_WIDTH}; got {width}.")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.embed = nn.Linear(dim, width)
        self.sides = nn.Parameter(0.02 * torch.randn(2, width))
        self.token = nn.Parameter(0.02 * torch.randn(width))
        heads = width // HEAD_WIDTH
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.gain = nn.Parameter(torch.tensor(4.0))

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"{self.embed.in_features}, width={self.embed.out_features}, depth={len(self.blocks)}"

    @torch.no_grad()
    def standardise_by(self, patches: torch.Tensor) -> None:
        """Set mean and standard deviation of each channel from patches (..., D), such as all training patches."""
        flat = patches.flatten(0, -2).float()
        self.mean.copy_(flat.mean(dim=0))
        self.std.copy_(flat.std(dim=0).clamp(min=1e-6))

    def late(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Late interaction of the standardised patches, averaged over both directions, (B,)."""
        first, second = ((patches - self.mean) / self.std for patches in (first, second))
        return (late_interaction(first, second) + late_interaction(second, first)) / 2

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logits of the pairs, (B,); they depend on the order within a pair (see `compare`)."""
        sides = [
            self.embed((patches - self.mean) / self.std) + side
            for patches, side in zip((first, second), self.sides.unbind())
        ]
        z = torch.cat([self.token.expand(len(first), 1, -1), *sides], dim=1)
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z[:, 0])).squeeze(-1) + self.gain * self.late(first, second)

    def compare(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logits of the pairs, (B,), averaged over both orders."""
        return (self(first, second) + self(second, first)) / 2
