r"""Comparing two images patch by patch: late interaction, and a transformer that reads both and gives one number.

With the patches a_1 .. a_N of one image and b_1 .. b_M of the other, standardised by channel,

    late(a, b)  = (1 / N) \sum_n  max_m  cos(a_n, b_m)                        nothing is learned (ColBERT, 2004.12832)
    z           = blocks([u ; W a + s_1 ; W b + s_2])                         u: class token, s: embedding of the side
    logit(a, b) = w_h . LN(z_0)  +  g (late(a, b) + late(b, a)) / 2  +  c

w_h starts at 0, so that an untrained pair encoder ranks as late interaction does, which is the control that it has to
beat. A pair costs a pass over N + M + 1 tokens: it re-ranks the nearest images of a search, and cannot search itself.

Source: the cross-encoder of Trans-Encoder, arXiv 2109.13059, read for patches; late interaction is our addition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PairEncoder", "late_interaction"]

HEAD_WIDTH = 16


def late_interaction(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Patches (..., N, D) and (..., M, D) -> the mean over the first's of the best cosine among the second's, (...)."""
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).transpose(-2, -1)
    return cosines.amax(dim=-1).mean(dim=-1)


class PairEncoder(nn.Module):
    """How alike two images are, from the patches of both (equations: see the module).

    Args:
        dim: Channels D of a patch.
        width: Channels inside, divisible by 16: heads are 16 wide.
        depth: Transformer blocks.

    Attributes:
        mean: Mean of each channel over patches, (D,).
        std: Deviation of each channel, (D,).

    Shape:
        (B, N, D) and (B, M, D) -> logits (B,).
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
        """Sizes, for `repr`."""
        return f"{self.embed.in_features}, width={self.embed.out_features}, depth={len(self.blocks)}"

    @torch.no_grad()
    def standardise_by(self, patches: torch.Tensor) -> None:
        """Take mean and deviation of each channel from patches (..., D), such as those of the training images."""
        flat = patches.flatten(0, -2).float()
        self.mean.copy_(flat.mean(dim=0))
        self.std.copy_(flat.std(dim=0).clamp(min=1e-6))

    def late(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Late interaction of standardised patches, the mean of both directions, (B,)."""
        first, second = ((patches - self.mean) / self.std for patches in (first, second))
        return (late_interaction(first, second) + late_interaction(second, first)) / 2

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logits of the pairs, (B,); the order within a pair matters, see `compare`."""
        sides = [
            self.embed((patches - self.mean) / self.std) + side
            for patches, side in zip((first, second), self.sides.unbind())
        ]
        z = torch.cat([self.token.expand(len(first), 1, -1), *sides], dim=1)
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z[:, 0])).squeeze(-1) + self.gain * self.late(first, second)

    def compare(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logits of the pairs, (B,), the mean of both orders."""
        return (self(first, second) + self(second, first)) / 2
