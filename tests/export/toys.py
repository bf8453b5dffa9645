"""Networks of a few weights that do what a real one must not do, or need not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import visionattn.kernels  # noqa: F401  registers the operators


class Toy(nn.Module):
    """A convolution, its mean over the image, three classes."""

    num_classes = 3
    pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return self.conv(image).mean((2, 3))


class PythonBranch(Toy):
    """Scales the image only where 8 does not divide its width; an export keeps one of the two ways."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return super().forward(image * 2 if image.shape[-1] % 8 else image)


class PooledGrid(Toy):
    """Pools to a grid of 2 x 2, whose windows an export bakes in."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return F.adaptive_avg_pool2d(self.conv(image).relu(), 2)[..., 0, 0]


class OneSize(Toy):
    """Multiplies by a table as large as the image."""

    pretrained_cfg = {"input_size": (3, 8, 8), "fixed_input_size": True}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) -> (B, 3)."""
        return super().forward(image * self.table)


class SpecialisedWidth(Toy):
    """Weighs columns by a ramp from torch.linspace, which fixes the width in an export."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return super().forward(image * torch.linspace(0, 1, image.shape[-1]))


class Gated(Toy):
    """Uses one of our operators."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return torch.ops.visionattn.symmetric_gate(self.conv(image), image).mean((2, 3))


class Pair(Toy):
    """Two images in, a map four times finer than its working grid and a vector out, sizes in steps of 8 from 16."""

    num_classes = 0
    task = "stereo"
    input_names = ("left", "right")
    output_names = ("map", "vector")
    size_multiple = 8
    size_minimum = 16

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of (B, 3, H, W) -> (B, 3, H / 2, W / 2), (B, 3)."""
        left, right = (F.pixel_unshuffle(self.conv(image), 8) for image in (left, right))
        return F.pixel_shuffle(left - 2 * right, 4), (left * right).unflatten(1, (3, -1)).mean((2, 3, 4))
