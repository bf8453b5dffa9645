"""The ResNets of 20 and 56 layers for CIFAR-10, as a frozen backbone; published weights fit.

Three stages of basic blocks, 16, 32 and 64 channels wide, on 32 x 32 pixels. A shortcut across stages keeps every
second pixel and pads the channels with zeros, half of them on either side. Source: arXiv 1512.03385, section 4.2,
option A.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["CifarResNet"]


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x))."""

    def __init__(self, dim_in: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.stride, self.padding = stride, (dim - dim_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers, (B, 3, 32, 32) -> (B, num_classes), maps of 64 x 8 x 8 at the end."""

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for place, (dim_in, dim, stride) in enumerate(widths, 1):
            stage = [BasicBlock(dim_in if i == 0 else dim, dim, stride if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{place}", nn.Sequential(*stage))
        self.feature_info = [
            {"num_chs": dim, "reduction": 2**i, "module": f"layer{i + 1}"} for i, (_, dim, _) in enumerate(widths)
        ]
        self.linear = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self, x: Tensor, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """timm's: maps after the stages, and the last."""
        assert output_fmt == "NCHW", "Maps have channels first."
        wanted, _ = feature_take_indices(3, indices)
        x, found = F.relu(self.bn1(self.conv1(x))), []
        for index, stage in enumerate((self.layer1, self.layer2, self.layer3)):
            x = stage(x)
            if index in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.forward_intermediates(x)[0].mean((2, 3)))


CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}
default_cfgs = generate_default_cfgs({"cifar_resnet20": CFG, "cifar_resnet56": CFG})


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, blocks=3, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, "cifar_resnet56", pretrained, blocks=9, **kwargs)
