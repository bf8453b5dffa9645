"""SPAN's successors from the NTIRE efficient super-resolution challenges of 2025 and 2026, of width C = 32, scale 4.

    name     blocks   first layer          gate of the blocks               fusion
    spanf    1 + 4    block 1              (h + x) * (sigmoid(h) - 0.5)     conv_cat over [near | f5 | f1]
    espan    5 + 1    9 x 9                the same                         conv_cat over [f0 | conv_2(f6) | f1 | f6]
    spanv2   1 + 4    block 1              (x + h) * (G h + g)              depthwise 3 x 3 over [near | f5]

`conv_cat` is followed by a 3 x 3 convolution, the depthwise convolution by a 1 x 1 convolution, and both by the pixel
shuffle. `near` is a convolution initialised as nearest-neighbour upsampling: r^2 copies of each pixel of the image, in
the order of a pixel shuffle. None of the networks normalises the image. The first block of SPANF and SPANV2 has three
convolutions and no gate, ESPAN's last block has two convolutions. SPANV2 has ReLU instead of SiLU, no biases, and a
learned 1 x 1 convolution (G, g) in the gate.

    name     parameters   GMACs at 256 x 256   radius in input pixels
    spanf       148,288          9.68            16
    espan       192,272         12.56            23
    spanv2      139,104          9.11            16

Sources: the networks of team 24 (SPANF) and 36 (ESPAN) of 2025 and of team 22 (SPANV2, first place) of 2026, as their
published weights have them; SPAN is arXiv 2311.12770. No paper describes them.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model

from visionattn.blocks.span import SPAB, Conv3XC
from visionattn.models.span import SuperResolver, _cfg, build, channels_last

__all__ = ["ESPAN", "SPANF", "SPANV2"]


def _nearest(in_chans: int, scale: int, device=None, dtype=None) -> nn.Conv2d:
    """Convolution (B, in_chans, H, W) -> (B, in_chans r^2, H, W) that copies each pixel r^2 times."""
    conv = nn.Conv2d(
        in_chans, in_chans * scale**2, 3, padding=1, groups=in_chans, bias=False, device=device, dtype=dtype
    )
    nn.init.zeros_(conv.weight)
    nn.init.ones_(conv.weight.detach()[:, :, 1, 1])
    return conv


class FirstBlock(nn.Module):
    """First block of SPANF: three convolutions with SiLU between them, and no gate.

    Shape:
        (B, in_chans, H, W) -> (B, C, H, W).
    """

    def __init__(self, in_chans: int, dim: int, branches: bool, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = Conv3XC(in_chans, dim, branches=branches, **dd)
        self.conv2 = Conv3XC(dim, dim, branches=branches, **dd)
        self.conv3 = Conv3XC(dim, dim, branches=branches, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, C, H, W)."""
        return self.conv3(F.silu(self.conv2(F.silu(self.conv1(x)))))


class ShortBlock(nn.Module):
    """Last block of ESPAN: SPAN's block with two convolutions.

    Shape:
        (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, branches: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.conv1 = Conv3XC(dim, dim, branches=branches, device=device, dtype=dtype)
        self.conv2 = Conv3XC(dim, dim, branches=branches, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.conv2(F.silu(self.conv1(x)))
        return torch.ops.visionattn.symmetric_gate(h, x)


class GuidedBlock(nn.Module):
    """SPANV2's block: (x + h) * (G h + g), h = conv3(ReLU(conv2(ReLU(conv1(x))))); the first block returns ReLU(h).

    Shape:
        (B, in_chans, H, W) -> (B, C, H, W).
    """

    def __init__(self, in_chans: int, dim: int, gate: bool, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.conv3 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.gate = nn.Conv2d(dim, dim, 1, **dd) if gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, C, H, W)."""
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        if self.gate is None:
            return F.relu(h)
        return (x + h) * self.gate(h)


class SPANF(SuperResolver):
    """SPANF of NTIRE 2025 (see the module).

    Args:
        width: Number of channels C.
        scale: Factor r by which height and width grow.
        in_chans: Image channels, 1 to 4, in and out.
        branches: Build the training form.

    Shape:
        (B, in_chans, H, W) in 0..1 -> (B, in_chans, rH, rW), not clamped, any H and W.
    """

    def __init__(
        self, width: int = 32, scale: int = 4, in_chans: int = 3, branches: bool = False, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(width, scale, in_chans, None, 16, None, **dd)
        pixels = in_chans * scale**2
        self.near = _nearest(in_chans, scale, **dd)
        self.first = FirstBlock(in_chans, width, branches, **dd)
        self.blocks = nn.ModuleList([SPAB(width, branches=branches, **dd) for _ in range(4)])
        self.conv_cat = nn.Conv2d(pixels + 2 * width, width, 1, **dd)
        self.upsampler = Conv3XC(width, pixels, branches=branches, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, rH, rW)."""
        f1 = self.first(channels_last(x))  # (B, C, H, W)
        f = f1
        for block in self.blocks:
            f, _ = block(f)
        z = self.conv_cat(torch.cat([self.near(x), f, f1], dim=1))
        return F.pixel_shuffle(self.upsampler(z), self.scale)


class ESPAN(SuperResolver):
    """ESPAN of NTIRE 2025 (see the module).

    Args:
        width: Number of channels C.
        scale: Factor r by which height and width grow.
        in_chans: Image channels, 1 to 4.
        out_chans: Output channels, 1 to 4; None: as the input.
        branches: Build the training form; the 9 x 9 convolution has no branches.

    Shape:
        (B, in_chans, H, W) in 0..1 -> (B, out_chans, rH, rW), not clamped, any H and W.
    """

    def __init__(
        self,
        width: int = 32,
        scale: int = 4,
        in_chans: int = 3,
        out_chans: int | None = None,
        branches: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(width, scale, in_chans, out_chans, 23, None, **dd)
        self.conv_1 = nn.Conv2d(in_chans, width, 9, padding=4, **dd)
        self.blocks = nn.ModuleList([SPAB(width, branches=branches, **dd) for _ in range(5)])
        self.last = ShortBlock(width, branches, **dd)
        self.conv_2 = Conv3XC(width, width, branches=branches, **dd)
        self.conv_cat = nn.Conv2d(4 * width, width, 1, **dd)
        self.upsampler = Conv3XC(width, self.out_chans * scale**2, branches=branches, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, out_chans, rH, rW)."""
        f0 = self.conv_1(channels_last(x))  # (B, C, H, W), as all that follow
        f, f1 = f0, f0
        for number, block in enumerate(self.blocks):
            f, _ = block(f)
            if number == 0:
                f1 = f
        f6 = self.last(f)
        z = self.conv_cat(torch.cat([f0, self.conv_2(f6), f1, f6], dim=1))
        return F.pixel_shuffle(self.upsampler(z), self.scale)


class SPANV2(SuperResolver):
    """SPANV2 of NTIRE 2026, whose gate is learned (see the module).

    Args:
        width: Number of channels C.
        scale: Factor r by which height and width grow.
        in_chans: Image channels, 1 to 4, in and out.

    Shape:
        (B, in_chans, H, W) in 0..1 -> (B, in_chans, rH, rW), not clamped, any H and W.
    """

    def __init__(self, width: int = 32, scale: int = 4, in_chans: int = 3, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(width, scale, in_chans, None, 16, None, **dd)
        pixels = in_chans * scale**2
        self.near = _nearest(in_chans, scale, **dd)
        self.blocks = nn.ModuleList(
            [GuidedBlock(width if number else in_chans, width, gate=number > 0, **dd) for number in range(5)]
        )
        wide = pixels + width
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False, **dd)
        self.pointwise = nn.Conv2d(wide, pixels, 1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, rH, rW)."""
        f = channels_last(x)
        for block in self.blocks:
            f = block(f)  # (B, C, H, W)
        z = self.depthwise(torch.cat([self.near(x), f], dim=1))
        return F.pixel_shuffle(self.pointwise(z), self.scale)


default_cfgs = generate_default_cfgs(
    {
        "va_spanf_x4.untrained": _cfg(first_conv="first.conv1.conv", paper_ids="none", paper_name="none"),
        "va_espan_x4.untrained": _cfg(first_conv="conv_1", paper_ids="none", paper_name="none"),
        "va_spanv2_x4.untrained": _cfg(first_conv="blocks.0.conv1", paper_ids="none", paper_name="none"),
    }
)


@register_model
def va_spanf_x4(pretrained: bool = False, **kwargs: Any) -> SPANF:
    """SPANF of 32 channels, second in the NTIRE 2025 efficient track."""
    return build(SPANF, "va_spanf_x4", pretrained, kwargs)


@register_model
def va_espan_x4(pretrained: bool = False, **kwargs: Any) -> ESPAN:
    """ESPAN of 32 channels, NTIRE 2025."""
    return build(ESPAN, "va_espan_x4", pretrained, kwargs)


@register_model
def va_spanv2_x4(pretrained: bool = False, **kwargs: Any) -> SPANV2:
    """SPANV2 of 32 channels, first in the NTIRE 2026 efficient track."""
    return build(SPANV2, "va_spanv2_x4", pretrained, kwargs)
