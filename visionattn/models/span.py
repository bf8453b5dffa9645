"""SPAN: a plain convolutional network for super-resolution whose blocks weigh features by a symmetric gate.

    x0  = (x - m) * R                         m the mean of training images, R = 255; left out with norm=False
    f0  = conv_1(x0)                          in_chans -> C
    f_i = SPAB_i(f_{i-1})   i = 1 .. 6        three 3 x 3 convolutions and the gate each
    z   = conv_cat([f0 | conv_2(f6) | f1 | s6])               1 x 1, 4C -> C; s6: SPAB_6's first convolution, activated
    out = pixel_shuffle_r(upsampler(z))                       3 x 3, C -> out_chans * r^2

All convolutions without a name of a size are 3 x 3. Images are RGB in 0..1, and so is the output, which is not clamped:
neither mean nor image is added back.

Variants: widths C of 26, 28, 32, 48 and 52, scales r of 2, 3 and 4 (parameters, and GMACs for an output of 1280 x 720,
counted here):

    C    x2 parameters  GMACs   x3 parameters  GMACs   x4 parameters  GMACs
    26         122,368   28.07        125,893   12.83        130,828   7.50   SPAN-Tiny, DSCF
    28         141,580   32.48        145,375   14.82        150,688   8.64   winner of NTIRE 2024's efficient track
    32         184,204   42.28        188,539   19.24        194,608  11.17
    48         410,700   94.39        417,195   42.62        426,288  24.49   the authors' code
    52         481,324  110.64        488,359   49.89        498,208  28.63   the paper's table

`create_model` builds the fused form, in which every convolution is one. `branches=True` builds the form that is
trained (`visionattn.blocks.span`), `fuse()` makes it the other. Published files of either form load into both.

Source: SPAN, arXiv 2311.12770. The paper's figure concatenates the output of block 5 where the authors' code and
weights, and this network, have s6.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from visionattn.blocks.span import SPAB, Conv3XC
from visionattn.errors import InputError
from visionattn.weights import SHIPPED
from visionattn.weights import span as layouts
from visionattn.weights.span import SCALES

__all__ = ["SPAN", "Normalisation", "SuperResolver"]


class Normalisation(nn.Module):
    """Take the mean off and stretch to the range that the network was trained in: (x - m) * R.

    Args:
        in_chans: Channels. m is the mean of DIV2K for RGB; each channel of other images has the mean of its three.
        img_range: Range R of the numbers. Other than 255, it is part of the state dict, since no shape tells it.
    """

    def __init__(self, in_chans: int, img_range: float = 255.0, device=None, dtype=None) -> None:
        super().__init__()
        self.factor = float(img_range)
        self.register_buffer("mean", torch.empty(1, in_chans, 1, 1, device=device, dtype=dtype), persistent=False)
        marker = None if self.factor == 255 else torch.full((1,), self.factor, device=device, dtype=dtype)
        self.register_buffer("img_range", marker)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fill in the mean."""
        rgb = torch.tensor(layouts.RGB_MEAN, dtype=torch.float64)
        channels = self.mean.shape[1]
        self.mean.copy_((rgb if channels == 3 else rgb.mean().expand(channels)).view(1, -1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        found = state_dict.get(f"{prefix}img_range")
        if found is not None and self.img_range is not None and found.item() != self.factor:
            errors.append(f"The weights are those of an img_range of {found.item()}, the model has {self.factor}.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.init_non_persistent_buffers()  # no file has the mean, and after `to_empty` it holds nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (x - self.mean) * self.factor


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Lay out a map with its channels together, as all that is computed from it then is.

    CPUs convolve it faster so, the more the smaller the image: otherwise each convolution reorders input and output.
    """
    # As x.contiguous(memory_format=torch.channels_last) does, which torch.vmap does not know.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class SuperResolver(nn.Module):
    """What networks of the family share: scale, normalisation, fusing, and published files.

    Args:
        num_features: Channels inside, C.
        scale: Height and width grow by this factor r.
        in_chans: Image channels, 1 to 4.
        out_chans: Channels of the output; None for those of the input.
        radius: An output pixel depends on the input pixels at most so far from its own.
        norm: Normalise the input; None where no network of the class does. False puts an entry `no_norm` into the state
            dict, since no shape tells.
        img_range: See `Normalisation`.

    Raises:
        InputError: A scale, a width or a number of channels that is not accepted.
    """

    task = "restore"
    size_multiple = 1
    size_minimum = 1
    output_names = ("upscaled",)
    num_classes = 0

    def __init__(
        self,
        num_features: int,
        scale: int,
        in_chans: int,
        out_chans: int | None,
        radius: int,
        norm: bool | None,
        img_range: float = 255.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.scale = scale
        self.in_chans = in_chans
        self.out_chans = in_chans if out_chans is None else out_chans
        self.radius = radius
        if not 1 <= in_chans <= 4 or not 1 <= self.out_chans <= 4:
            raise InputError(f"Images have 1 to 4 channels, but got {in_chans} in and {self.out_chans} out.")
        if scale < 1 or num_features < 1:
            raise InputError(f"Scale and width are 1 or more, but got {scale} and {num_features}.")
        self.norm = Normalisation(in_chans, img_range, device, dtype) if norm else nn.Identity()
        if norm is False:
            self.register_buffer("no_norm", torch.zeros(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_take_published)

    def _load_from_state_dict(self, state_dict, *args):
        # With assign=True the weights come from the meta device to that of the file; the mean, which no file has, too.
        if isinstance(self.norm, Normalisation) and self.norm.mean.is_meta and state_dict:
            self.norm.mean = torch.empty_like(self.norm.mean, device=next(iter(state_dict.values())).device)
        super()._load_from_state_dict(state_dict, *args)

    @torch.jit.ignore
    def fuse(self) -> "SuperResolver":
        """Make every convolution in branches one convolution, computed in float64; the branches are deleted."""
        for module in self.modules():
            if isinstance(module, Conv3XC):
                module.fuse()
        return self

    @torch.jit.ignore
    def unfuse(self) -> "SuperResolver":
        """Give every fused convolution branches that compute the same, to train them on."""
        for module in list(self.modules()):
            if isinstance(module, Conv3XC):
                module.unfuse()
        return self


Network = TypeVar("Network", bound=SuperResolver)


def _take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: what has another layout, or other branches, becomes what the model has."""
    own = layouts.adapt(state, model.state_dict(), prefix)
    if own is not state:
        state.clear()
        state.update(own)


class SPAN(SuperResolver):
    """Swift parameter-free attention network (equations and variants: see the module).

    Args:
        width: Channels C.
        scale: Height and width grow by this factor r.
        in_chans: Image channels, 1 to 4.
        out_chans: Channels of the output; None for those of the input.
        cat_width: Channels of z; None for C. A pruned network has fewer.
        branches: Build the form that is trained.
        norm: Normalise the input; off for files that say so.
        img_range: Range R that the input is stretched to.

    Shape:
        (B, in_chans, H, W) in 0..1 -> (B, out_chans, rH, rW), not clamped, any H and W.

    Raises:
        InputError: A scale, a width or a number of channels that is not accepted.
    """

    def __init__(
        self,
        width: int = 48,
        scale: int = 4,
        in_chans: int = 3,
        out_chans: int | None = None,
        cat_width: int | None = None,
        branches: bool = False,
        norm: bool = True,
        img_range: float = 255.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(width, scale, in_chans, out_chans, 21, norm, img_range, **dd)
        cat_width = width if cat_width is None else cat_width
        self.conv_1 = Conv3XC(in_chans, width, branches=branches, **dd)
        self.blocks = nn.ModuleList([SPAB(width, branches=branches, **dd) for _ in range(6)])
        self.conv_2 = Conv3XC(width, width, branches=branches, **dd)
        self.conv_cat = nn.Conv2d(4 * width, cat_width, 1, **dd)
        self.upsampler = nn.Conv2d(cat_width, self.out_chans * scale**2, 3, padding=1, **dd)
        if norm and self.out_chans == in_chans <= min(width, cat_width):
            self.init_weights()

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self) -> None:
        """Start as bilinear interpolation, to which the rest of the network adds little.

        The first channels of f0 and of z carry the image. PyTorch's own start is noise, which a training would have to
        unlearn first.
        """
        image, r = self.in_chans, self.scale
        unit = 4 / self.norm.factor  # features of about 1, where the normalised image is about 100
        first = self.conv_1
        branches = first.conv is None
        first.fuse()
        first.conv.weight.mul_(unit)
        first.conv.weight[:image] = 0
        first.conv.bias[:image] = 0
        for channel in range(image):
            first.conv.weight[channel, channel, 1, 1] = unit
        if branches:
            first.unfuse()
        self.conv_cat.weight[:image] *= 0.1
        self.conv_cat.weight[:image, :image] = torch.eye(image)[..., None, None]
        self.conv_cat.bias[:image] = 0
        self.upsampler.weight.mul_(0.1)
        self.upsampler.weight[:, :image] = 0
        offset = (torch.arange(r) + 0.5) / r - 0.5  # of each new pixel from the centre of the old one
        line = torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)], dim=1)  # (r, 3)
        kernel = torch.einsum("iy,jx->ijyx", line, line).flatten(0, 1) / 4  # (r r, 3, 3)
        for channel in range(image):
            rows = slice(channel * r**2, (channel + 1) * r**2)
            self.upsampler.weight[rows, channel] = kernel.to(self.upsampler.weight)
            self.upsampler.bias[rows] = self.norm.mean[0, channel, 0, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, out_chans, rH, rW)."""
        f0 = channels_last(self.conv_1(self.norm(x)))  # (B, C, H, W), as all that follow
        f, f1, s = f0, f0, f0
        for number, block in enumerate(self.blocks):
            f, s = block(f)
            if number == 0:
                f1 = f
        z = self.conv_cat(torch.cat([f0, self.conv_2(f), f1, s], dim=1))  # (B, cat_width, H, W)
        return F.pixel_shuffle(self.upsampler(z), self.scale)


WIDTHS = {
    26: "SPAN-Tiny's width, DSCF's too",
    28: "the width of NTIRE 2024's winner",
    32: "width 32",
    48: "the width of the authors' code",
    52: "the width of the paper's table",
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 64, 64),
        "num_classes": -1,  # no classifier
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv_1.conv",
        "classifier": None,
        "paper_ids": "arXiv:2311.12770",
        "paper_name": "Swift Parameter-free Attention Network for Efficient Super-Resolution",
        "license": "apache-2.0",
        **kwargs,
    }


TRAINED_HERE = ("va_span_ch26_x2", "va_span_ch26_x4")

default_cfgs = generate_default_cfgs(
    {
        **{f"va_span_ch{width}_x{scale}.untrained": _cfg() for width in WIDTHS for scale in SCALES},
        **{f"{name}.wallpapers": _cfg(file=str(SHIPPED / f"{name}.safetensors")) for name in TRAINED_HERE},
    }
)


def build(network: type[Network], name: str, pretrained: bool, settings: dict[str, Any]) -> Network:
    """Make a network by timm's rules.

    timm's folders say `num_classes` of every model, here 0, which then comes back as an argument.
    """
    if settings.get("num_classes"):
        raise TypeError(f"{name} upscales and has no classes, but got num_classes={settings['num_classes']}.")
    channels = {key: settings.get(key) for key in ("in_chans", "out_chans")}
    if pretrained and any(count not in (None, 3) for count in channels.values()):
        given = ", ".join(f"{key}={count}" for key, count in channels.items() if count is not None)
        raise InputError(f"The weights of {name} are for images of 3 channels, but got {given}: build it without them.")
    return build_model_with_cfg(network, name, pretrained, kwargs_filter=("num_classes",), **settings)


def _entry_point(width: int, scale: int) -> Callable[..., SPAN]:
    """One of the fifteen names; timm files them under the function's own name."""
    name = f"va_span_ch{width}_x{scale}"

    def entry_point(pretrained: bool = False, **kwargs: Any) -> SPAN:
        return build(SPAN, name, pretrained, {"width": width, "scale": scale, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"SPAN of {width} channels for a scale of {scale}: {WIDTHS[width]}."
    return register_model(entry_point)


for _width in WIDTHS:
    for _scale in SCALES:
        globals()[f"va_span_ch{_width}_x{_scale}"] = _entry_point(_width, _scale)
