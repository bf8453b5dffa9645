"""MobileNet-V1 and -V2 with subspace attention (ULSAM) that replaces some of their blocks or follows them.

The networks are timm's `EfficientNet` with the layout of its `mobilenetv1_100` and `mobilenetv2_100`; without subspace
attention (`places=()`) they have the same parameters and state-dict keys. Blocks are numbered from 1 after the stem, to
13 in V1 and to 17 in V2. A block with stride 1 and equal input and output width can be replaced: 3, 5, 7 to 11 and 13
of V1; 3, 5, 6, 8 to 10, 12, 13, 15 and 16 of V2.

Variants (width of the replaced blocks; parameters and MACs counted at 224 x 224, 1000 classes, paper form; values
printed in the paper):

    name                                     replaced        parameters   MMACs     paper
    va_mobilenetv1_ulsam_100                 512              3,964,200   516.66    3.9 M, 517 M
    va_mobilenetv1_ulsam_075                 384              2,433,880   295.97    2.4 M, 296 M
    va_mobilenetv1_ulsam_050                 256              1,263,240   136.30    1.2 M, 136 M
    va_mobilenetv2_ulsam_100                 96, 160          3,067,112   262.66    2.97 M, 261.88 M
    va_mobilenetv2_ulsam_100_96              96               3,386,792   278.12    3.28 M, 277.34 M
    va_mobilenetv2_ulsam_100_160             160              3,185,192   285.31    3.08 M, 284.54 M
    va_mobilenetv2_ulsam_100_64_96           64, 96           3,332,648   267.83    3.23 M, 267.06 M
    va_mobilenetv2_ulsam_100_2x160           2 x 160          2,865,512   269.85    2.77 M, 269.08 M
    va_mobilenetv2_ulsam_100_2x96_2x160      2 x 96, 2 x 160  2,629,352   224.54    2.54 M, 223.77 M

The paper's values of V2 are relative to a base of 3.4 M parameters and 300 M MACs; the base actually has 3,504,872 and
300.77 M. The paper does not state which of several equal blocks it replaced; here it is the last of them.

`va_mobilenetv2_ulsam_050_32` is for small images: half the width, and no stride in the stem and the second stage.
The package has weights for it; no others of these networks are public.

Sources: ULSAM, arXiv 2006.15102; MobileNets, arXiv 1704.04861 and 1801.04381. The equations of the attention are in
`visionattn.blocks.subspace`.
"""

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import EfficientNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import nn

from visionattn.blocks.subspace import SubspaceAttention
from visionattn.errors import InputError
from visionattn.weights import SHIPPED

__all__ = ["MobileNetUlsam"]

# Stages in timm's notation: kind of block, repeats, kernel, stride of the first, expansion, channels.
LAYOUTS = {
    "v1": ("dsa_r1_k3_s1_c64", "dsa_r2_k3_s2_c128", "dsa_r2_k3_s2_c256", "dsa_r6_k3_s2_c512", "dsa_r2_k3_s2_c1024"),
    "v2": (
        "ds_r1_k3_s1_c16",
        "ir_r2_k3_s2_e6_c24",
        "ir_r3_k3_s2_e6_c32",
        "ir_r4_k3_s2_e6_c64",
        "ir_r3_k3_s1_e6_c96",
        "ir_r3_k3_s2_e6_c160",
        "ir_r1_k3_s1_e6_c320",
    ),
}


class MobileNetUlsam(EfficientNet):
    """MobileNet with subspace attention (table of variants: see the module).

    Args:
        layout: `"v1"` or `"v2"`.
        width: Channels as a multiple of the layout's, rounded to multiples of 8.
        places: Indices of the blocks, from 1, that subspace attention replaces or follows.
        mode: `"replace"` or `"add"`.
        num_subspaces: See `SubspaceAttention`.
        form: See `SubspaceAttention`.
        gain: See `SubspaceAttention`.
        small: Remove the stride of the stem and of the second stage, for images of 32 x 32 pixels.
        in_chans: Image channels.
        num_classes: Classes; 0 for features.
        global_pool: Read-out: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"` or `""` (the map).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising from 0 block by block.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), any H and W; below `size_minimum` the last maps are single pixels.

    Raises:
        InputError: A block does not exist or cannot be replaced, `mode` is unknown, or the channels of a block are not
            divisible by `num_subspaces`.
    """

    task = "classify"
    size_multiple = 1
    size_minimum = 32

    def __init__(
        self,
        layout: str = "v2",
        width: float = 1.0,
        places: tuple[int, ...] = (),
        mode: str = "replace",
        num_subspaces: int = 4,
        form: str = "paper",
        gain: str = "paper",
        small: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        if mode not in ("replace", "add"):
            raise InputError(f"mode must be one of 'replace', 'add'; got {mode!r}.")
        dd = {"device": device, "dtype": dtype}
        channels = partial(round_channels, multiplier=width)
        stages = [
            [stage.replace("_s2_", "_s1_") if small and n == 1 else stage] for n, stage in enumerate(LAYOUTS[layout])
        ]
        super().__init__(
            decode_arch_def(stages),
            num_classes=num_classes,
            num_features=max(1280, channels(1280)) if layout == "v2" else 0,
            in_chans=in_chans,
            act_layer=nn.ReLU6,
            round_chs_fn=channels,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
            **dd,
        )
        if small:  # timm's stems all have a stride
            self.size_minimum = 8
            self.conv_stem.stride = (1, 1)
            for level in self.feature_info:
                level["reduction"] //= 2
        blocks = [(stage, index) for stage in self.blocks for index in range(len(stage))]
        widths = [stage[index].feature_info("bottleneck")["num_chs"] for stage, index in blocks]
        accepted = [
            number
            for number, (stage, index) in enumerate(blocks, 1)
            if mode == "add"
            or (number > 1 and widths[number - 1] == widths[number - 2] and stage[index].conv_dw.stride == (1, 1))
        ]
        if not set(places) <= set(accepted):
            raise InputError(f"places of mode {mode!r} must be among {', '.join(map(str, accepted))}; got {places}.")
        for place in places:
            stage, index = blocks[place - 1]
            attention = SubspaceAttention(widths[place - 1], num_subspaces, form, gain, **dd)
            stage[index] = attention if mode == "replace" else nn.Sequential(stage[index], attention)


V1 = {"layout": "v1", "places": (11,)}
V2 = {"layout": "v2"}

# Other arguments have the defaults of `MobileNetUlsam`.
VARIANTS: dict[str, dict[str, Any]] = {
    "va_mobilenetv1_ulsam_100": V1,
    "va_mobilenetv1_ulsam_075": {**V1, "width": 0.75},
    "va_mobilenetv1_ulsam_050": {**V1, "width": 0.5},
    "va_mobilenetv2_ulsam_100": {**V2, "places": (13, 16)},
    "va_mobilenetv2_ulsam_100_96": {**V2, "places": (13,)},
    "va_mobilenetv2_ulsam_100_160": {**V2, "places": (16,)},
    "va_mobilenetv2_ulsam_100_64_96": {**V2, "places": (10, 13)},
    "va_mobilenetv2_ulsam_100_2x160": {**V2, "places": (15, 16)},
    "va_mobilenetv2_ulsam_100_2x96_2x160": {**V2, "places": (12, 13, 15, 16)},
    "va_mobilenetv2_ulsam_050_32": {**V2, "places": (13, 16), "width": 0.5, "small": True},
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "paper_ids": "arXiv:2006.15102",
        "paper_name": "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        "license": "apache-2.0",
        **kwargs,
    }


_cifar = partial(
    _cfg,
    input_size=(3, 32, 32),
    num_classes=10,
    pool_size=(4, 4),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

SMALL = "va_mobilenetv2_ulsam_050_32"

default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.untrained": _cfg() for name in VARIANTS if name != SMALL},
        f"{SMALL}.cifar10": _cifar(file=str(SHIPPED / f"{SMALL}.safetensors")),
    }
)


def _mobilenet_ulsam(name: str, pretrained: bool, settings: dict[str, Any]) -> MobileNetUlsam:
    settings = {**VARIANTS[name], **settings}
    levels = 4 if settings.get("small") else 5
    return build_model_with_cfg(
        MobileNetUlsam,
        name,
        pretrained,
        feature_cfg={"out_indices": tuple(range(levels)), "feature_cls": "getter"},
        **settings,
    )


@register_model
def va_mobilenetv1_ulsam_100(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V1, one of the five blocks of 512 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv1_ulsam_100", pretrained, kwargs)


@register_model
def va_mobilenetv1_ulsam_075(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V1 of width 0.75, one of the five blocks of 384 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv1_ulsam_075", pretrained, kwargs)


@register_model
def va_mobilenetv1_ulsam_050(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V1 of width 0.5, one of the five blocks of 256 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv1_ulsam_050", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, a block of 96 and one of 160 channels replaced: the paper's best on ImageNet."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100_96(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, a block of 96 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100_96", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100_160(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, a block of 160 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100_160", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100_64_96(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, a block of 64 and one of 96 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100_64_96", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100_2x160(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, two blocks of 160 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100_2x160", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_100_2x96_2x160(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2, two blocks of 96 and two of 160 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_100_2x96_2x160", pretrained, kwargs)


@register_model
def va_mobilenetv2_ulsam_050_32(pretrained: bool = False, **kwargs: Any) -> MobileNetUlsam:
    """MobileNet-V2 of width 0.5 for 32 x 32 images, a block of 48 and one of 80 channels replaced."""
    return _mobilenet_ulsam("va_mobilenetv2_ulsam_050_32", pretrained, kwargs)
