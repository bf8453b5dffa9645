"""The encoder of MatchStereo and MatchFlow: features of a view at 1/4 to 1/32 of its size, and their fusion.

Images in 0..1 are mapped to 2 x - 1:

    stem    3 x 3 at stride 2 -> C_1 / 2, instance norm, GELU, 3 x 3 at stride 2 -> C_1, instance norm, GELU
    block   x += W_2 DW(GELU(W_1 LN x))      W_1: C -> 2C, DW: 3 x 3 by channel, W_2: 2C -> C, no biases
            x += W_4 GELU(W_3 LN x)          likewise
    down    3 x 3 at stride 2 of LN x, with a bias, between resolutions

At each resolution but the lowest, the decoder fuses the encoder's features E and its own x at half the resolution:

    fusion  3 x 3 ReLU(1 x 1 [E, transposed convolution of x])      2 x 2 at stride 2

Source: MatchAttention, arXiv 2510.14260.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["MatchEncoder", "MatchFusion"]


class SepConvBlock(nn.Module):
    """A block of the encoder: separable convolution, then MLP (equations: see the module).

    Args:
        dim: Channels C.

    Shape:
        (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, bias=False, **dd)
        self.token_mixer = SepConv(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, bias=False, **dd)
        self.mlp = Mlp(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.token_mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SepConv(nn.Module):
    """W_2 DW(GELU(W_1 x)), (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"bias": False, "device": device, "dtype": dtype}
        self.pwconv1 = nn.Linear(dim, 2 * dim, **dd)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, **dd)
        self.pwconv2 = nn.Linear(2 * dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = F.gelu(self.pwconv1(x))
        return self.pwconv2(_last(self.dwconv(_first(x))))


class Mlp(nn.Module):
    """W_4 GELU(W_3 x), (..., C) -> (..., C)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(2 * dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Downsampling(nn.Module):
    """A 3 x 3 convolution at stride 2 of LN x, (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim, eps=1e-6, bias=False, device=device, dtype=dtype)
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        return _last(self.conv(_first(self.pre_norm(x))))


class MatchEncoder(nn.Module):
    """Features of each view at 1/4 to 1/32 of its size (equations: see the module).

    Args:
        widths: Channels C_1 to C_4.
        depths: Blocks at 1/4 to 1/32.

    Shape:
        (B, 3, H, W), H and W multiples of 32 -> (B, H / 4, W / 4, C_1) to (B, H / 32, W / 32, C_4).
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        first = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, stride=2, padding=1, **dd),
            nn.InstanceNorm2d(first // 2),
            nn.GELU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1, **dd),
            nn.InstanceNorm2d(first),
            nn.GELU(),
        )
        self.downsamplings = nn.ModuleList([Downsampling(*pair, **dd) for pair in pairwise(widths)])
        self.stages = nn.ModuleList(
            [nn.Sequential(*[SepConvBlock(width, **dd) for _ in range(n)]) for width, n in zip(widths, depths)]
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> four maps, the finest first."""
        x, maps = _last(self.stem(2 * x - 1)), []
        for stage, down in zip(self.stages, self.downsamplings):
            maps.append(stage(x))
            x = down(maps[-1])
        maps.append(self.stages[-1](x))
        return maps


class MatchFusion(nn.Module):
    """Fuse features of a resolution with those of half of it (equations: see the module).

    Args:
        dim_low: Channels of the low-resolution map.
        dim: Channels C of the high-resolution map, and of the output.

    Shape:
        skip (B, 2H, 2W, C), x (B, H, W, dim_low) -> (B, 2H, 2W, C).
    """

    def __init__(self, dim_low: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.up = nn.ConvTranspose2d(dim_low, dim, 2, stride=2, **dd)
        self.conv = nn.Sequential(nn.Conv2d(2 * dim, dim, 1, **dd), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1, **dd))

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(B, 2H, 2W, C), (B, H, W, dim_low) -> (B, 2H, 2W, C)."""
        return _last(self.conv(torch.cat([_first(skip), self.up(_first(x))], 1)))


def _first(x: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def _last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)
