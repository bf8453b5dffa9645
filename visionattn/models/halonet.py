"""HaloNet: a residual network whose spatial mixing is halo attention.

The macro architecture is a ResNet's: a 7 x 7 stem of stride 2 and a max pool, four stages of bottlenecks of width
64, 128, 256, 512 with 3, 3, l3, 3 blocks and 4, 8, 8, 8 heads, the first block of stages 2 to 4 with stride 2, then an
optional 1 x 1 convolution to d_f channels, average pooling and a classifier. A bottleneck is

    1 x 1 convolution to the width -> halo attention, values r_v times as wide -> 1 x 1 convolution to r_b * width

with batch norm and SiLU after each, the last SiLU after the residual sum. Any stage can use 3 x 3 convolutions instead
of attention (`stages=("conv", "conv", "halo", "halo")`): the paper's hybrids.

Variants (b block, h halo; parameters and GMACs counted here, 1000 classes):

    name  b   h  r_v  r_b   l3  d_f   image  parameters   GMACs
    h0    8   3  1.0  0.5    7     -   256    5,502,248
    h1    8   3  1.0  1.0   10     -   256    8,101,352
    h2    8   3  1.0  1.25  11     -   256    9,405,608
    h3   10   3  1.0  1.5   12  1024   320   11,842,792
    h4   12   2  1.0  3.0   12  1280   384   19,103,464
    h5   14   2  2.5  2.0   23  1536   448   30,718,952
    h6    8   4  3.0  2.75  24  1536   512   43,458,280
    h7   10   3  4.0  3.5   26  2048   600   67,434,728

The parameter counts match the paper's to the printed digits. No trained weights of H0 to H7 are public;
`va_halonet_nano_32` has weights of this package.

`nano_32` is for small images: a 3 x 3 stem without stride, a convolutional stage at full resolution, and two attention
stages with b = 4, h = 2 at 1/2 and 1/4.

Images of any size are accepted. If the size of a map is not divisible by b, such as 75, 38 and 19 of H7 at 600 pixels,
the last blocks of a row and column extend beyond the map; with `border="mask"` the positions beyond it are masked.

Source: HaloNet, arXiv 2103.12731; the equations of the attention are in `visionattn.blocks.halo`. Modules have the
names of timm's `ByobNet`, on which the network is built.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct, DropPath
from timm.models import ByobNet, ByoModelCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, LayerFn, create_shortcut

from visionattn.blocks.halo import HaloAttention
from visionattn.errors import InputError
from visionattn.weights import SHIPPED

__all__ = ["HaloBlock", "HaloNet"]


class HaloBlock(nn.Module):
    """Residual bottleneck with halo attention between two 1 x 1 convolutions.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        width: Channels of queries and keys.
        value_ratio: Channels of the values as a multiple of the width, r_v.
        stride: Stride of the attention's queries and of the shortcut.
        layers: Norm and activation, as timm's `ByobNet` passes them.
        drop_path_rate: Probability of dropping the residual branch in training.
        **attention: Further arguments of `HaloAttention`.

    Shape:
        (B, in_chs, H, W) -> (B, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        width: int,
        value_ratio: float,
        stride: int,
        layers: LayerFn,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **attention: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_heads, dim_values = attention["num_heads"], round(width * value_ratio)
        if width % num_heads:
            raise InputError(f"The attention width ({width}) must be divisible by num_heads ({num_heads}).")
        shortcut = create_shortcut(
            "conv1x1", in_chs, out_chs, stride=stride, dilation=(1, 1), apply_act=False, layers=layers, **dd
        )
        assert shortcut is not None  # of this kind there always is one
        self.shortcut = shortcut
        self.conv1_1x1 = layers.conv_norm_act(in_chs, width, 1, **dd)
        self.self_attn = HaloAttention(width, dim_values, dim_head=width // num_heads, stride=stride, **attention, **dd)
        self.post_attn = layers.norm_act(dim_values, **dd)
        self.conv3_1x1 = layers.conv_norm_act(dim_values, out_chs, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.act = layers.act(inplace=True)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialise the attention; with `zero_init_last` the block starts as its shortcut alone."""
        if zero_init_last:
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.self_attn.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) -> (B, out_chs, H', W')."""
        y = self.conv1_1x1(x)
        y = self.post_attn(self.self_attn(y))
        y = self.drop_path(self.conv3_1x1(y))
        return self.act(y + self.shortcut(x))


class HaloNet(ByobNet):
    """Residual network of halo attention (table of variants: see the module).

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for features.
        global_pool: Read-out: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"` or `""` (the map).
        stem: `"7x7"`, stride 2 and a max pool, or `"3x3"`, stride 1.
        stem_width: Channels of the stem.
        widths: Width of the bottlenecks of each stage.
        depths: Blocks of each stage.
        heads: Heads of each stage.
        stages: `"halo"` or `"conv"` for each stage.
        expansion: Output channels of a block as a multiple of its width, r_b.
        value_ratio: Channels of the values as a multiple of the width, r_v.
        num_features: Channels d_f of the last convolution; 0 leaves it out.
        block_size: Side b of an attention block, in pixels of its map.
        halo_size: Width h of the halo around it, in pixels of its map; 0: windows do not overlap.
        border: See `HaloAttention`.
        index: See `HaloAttention`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last stage, rising from 0 stage by stage.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), any H and W.

    Raises:
        InputError: The lists of stages differ in length, or a stage is neither `"halo"` nor `"conv"`.
    """

    task = "classify"
    size_multiple = 1
    size_minimum = 1

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem: str = "7x7",
        stem_width: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 3, 10, 3),
        heads: tuple[int, ...] = (4, 8, 8, 8),
        stages: tuple[str, ...] = ("halo", "halo", "halo", "halo"),
        expansion: float = 1.0,
        value_ratio: float = 1.0,
        num_features: int = 0,
        block_size: int = 8,
        halo_size: int = 3,
        border: str = "mask",
        index: str = "offset",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        if not len(widths) == len(depths) == len(heads) == len(stages):
            raise InputError(
                f"widths, depths, heads and stages must have one entry per stage; got {len(widths)}, {len(depths)}, "
                f"{len(heads)} and {len(stages)} entries."
            )
        if unknown := set(stages) - {"halo", "conv"}:
            raise InputError(f"stages must be 'halo' or 'conv'; got {', '.join(map(repr, sorted(unknown)))}.")
        attention = {"block_size": block_size, "halo_size": halo_size, "border": border, "index": index}

        def block(
            in_chs: int,
            out_chs: int,
            stride: int,
            width: int,
            layers: LayerFn,
            drop_path_rate,
            device,
            dtype,
            **more: Any,
        ) -> HaloBlock:
            # timm passes every option of its own blocks; a halo block has only these.
            return HaloBlock(
                in_chs,
                out_chs,
                width,
                value_ratio,
                stride,
                layers,
                drop_path_rate,
                num_heads=more["num_heads"],
                **attention,
                device=device,
                dtype=dtype,
            )

        def stage(number: int) -> ByoBlockCfg:
            width, out = widths[number], round(widths[number] * expansion)
            kind: Any = partial(block, width=width, num_heads=heads[number]) if stages[number] == "halo" else "bottle"
            return ByoBlockCfg(kind, d=depths[number], c=out, s=1 if number == 0 else 2, br=width / out)

        super().__init__(
            ByoModelCfg(
                blocks=tuple(stage(number) for number in range(len(stages))),
                downsample="conv1x1",
                stem_type=stem,
                stem_pool="maxpool" if stem == "7x7" else "",
                stem_chs=stem_width,
                num_features=num_features,
                act_layer="silu",
            ),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        if isinstance(self.stem, ConvNormAct):  # timm's stems all have a stride
            self.stem.conv.stride = (1, 1)
            for level in self.feature_info:
                level["reduction"] //= 2


# The paper's table; other arguments have the defaults of `HaloNet`.
VARIANTS: dict[str, dict[str, Any]] = {
    "h0": {"depths": (3, 3, 7, 3), "expansion": 0.5},
    "h1": {"depths": (3, 3, 10, 3), "expansion": 1.0},
    "h2": {"depths": (3, 3, 11, 3), "expansion": 1.25},
    "h3": {"block_size": 10, "depths": (3, 3, 12, 3), "expansion": 1.5, "num_features": 1024},
    "h4": {"block_size": 12, "halo_size": 2, "depths": (3, 3, 12, 3), "expansion": 3.0, "num_features": 1280},
    "h5": {
        "block_size": 14,
        "halo_size": 2,
        "depths": (3, 3, 23, 3),
        "expansion": 2.0,
        "value_ratio": 2.5,
        "num_features": 1536,
    },
    "h6": {"halo_size": 4, "depths": (3, 3, 24, 3), "expansion": 2.75, "value_ratio": 3.0, "num_features": 1536},
    "h7": {"block_size": 10, "depths": (3, 3, 26, 3), "expansion": 3.5, "value_ratio": 4.0, "num_features": 2048},
    "nano_32": {
        "stem": "3x3",
        "stem_width": 16,
        "widths": (16, 32, 64),
        "depths": (1, 2, 2),
        "heads": (1, 2, 4),
        "stages": ("conv", "halo", "halo"),
        "expansion": 2.0,
        "block_size": 4,
        "halo_size": 2,
    },
}


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "num_classes": 1000,
        "pool_size": (-(-size // 32),) * 2,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2103.12731",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "va_halonet_h0.untrained": _cfg(256),
        "va_halonet_h1.untrained": _cfg(256),
        "va_halonet_h2.untrained": _cfg(256),
        "va_halonet_h3.untrained": _cfg(320),
        "va_halonet_h4.untrained": _cfg(384),
        "va_halonet_h5.untrained": _cfg(448),
        "va_halonet_h6.untrained": _cfg(512),
        "va_halonet_h7.untrained": _cfg(600),
        "va_halonet_nano_32.cifar10": _cfg(
            32,
            file=str(SHIPPED / "va_halonet_nano_32.safetensors"),
            num_classes=10,
            pool_size=(8, 8),
            crop_pct=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            first_conv="stem.conv",
        ),
    }
)


def _halonet(variant: str, pretrained: bool, settings: dict[str, Any]) -> HaloNet:
    settings = {**VARIANTS[variant], **settings}
    levels = len(settings["depths"]) + (settings.get("stem") != "3x3")  # a stem with a stride adds a level
    return build_model_with_cfg(
        HaloNet,
        f"va_halonet_{variant}",
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(levels))},
        **settings,
    )


@register_model
def va_halonet_h0(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H0."""
    return _halonet("h0", pretrained, kwargs)


@register_model
def va_halonet_h1(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H1."""
    return _halonet("h1", pretrained, kwargs)


@register_model
def va_halonet_h2(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H2."""
    return _halonet("h2", pretrained, kwargs)


@register_model
def va_halonet_h3(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H3."""
    return _halonet("h3", pretrained, kwargs)


@register_model
def va_halonet_h4(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H4."""
    return _halonet("h4", pretrained, kwargs)


@register_model
def va_halonet_h5(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H5."""
    return _halonet("h5", pretrained, kwargs)


@register_model
def va_halonet_h6(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H6."""
    return _halonet("h6", pretrained, kwargs)


@register_model
def va_halonet_h7(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H7."""
    return _halonet("h7", pretrained, kwargs)


@register_model
def va_halonet_nano_32(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """Three stages for 32 x 32 images."""
    return _halonet("nano_32", pretrained, kwargs)
