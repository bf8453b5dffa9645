"""SPAN: a convolutional network for super-resolution whose blocks weight features with a symmetric gate.

    x0  = (x - m) * R                         m: mean of the training images, R = 255; skipped with norm=False
    f0  = conv_1(x0)                          in_chans -> C
    f_i = SPAB_i(f_{i-1})   i = 1 .. 6        three 3 x 3 convolutions and the gate each
    z   = conv_cat([f0 | conv_2(f6) | f1 | s6])               1 x 1, 4C -> C; s6: SPAB_6's first convolution, activated
    out = pixel_shuffle_r(upsampler(z))                       3 x 3, C -> out_chans * r^2

Convolutions are 3 x 3 unless stated otherwise. Images are RGB in 0..1; the output has the same range and is not
clamped. Neither the mean nor the input image is added to the output.

Variants: widths C of 26, 28, 32, 48 and 52, scales r of 2, 3 and 4 (parameters, and GMACs for an output of 1280 x 720
pixels, both counted here):

    C    x2 parameters  GMACs   x3 parameters  GMACs   x4 parameters  GMACs
    26         122,368   28.07        125,893   12.83        130,828   7.50   SPAN-Tiny, DSCF
    28         141,580   32.48        145,375   14.82        150,688   8.64   winner of NTIRE 2024's efficient track
    32         184,204   42.28        188,539   19.24        194,608  11.17
    48         410,700   94.39        417,195   42.62        426,288  24.49   the authors' code
    52         481,324  110.64        488,359   49.89        498,208  28.63   the paper's table

`create_model` builds the fused form with plain convolutions. `branches=True` builds the training form, whose
convolutions have several branches (`visionattn.blocks.span`); `fuse()` converts it to the fused form. Published files
of either form load into both.

Source: SPAN, arXiv 2311.12770. The paper's figure concatenates the output of block 5 instead of s6; the authors' code
and weights, and this network, use s6.
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
    """Normalise images to the range that the network was trained in: (x - m) * R.

    Args:
        in_chans: Number of channels. m is DIV2K's mean of RGB; for other images each channel has the mean of the three.
        img_range: Range R. A value other than 255 is stored in the state dict, since the shapes do not reveal it.
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
            errors.append(f"The weights are for an img_range of {found.item()}; the model has {self.factor}.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.init_non_persistent_buffers()  # files lack the mean, and after `to_empty` it is undefined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (x - self.mean) * self.factor


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Convert a map to the channels-last memory format, which all maps computed from it keep.

    CPU convolutions are faster in this format, most for small images: otherwise each one reorders input and output.
    """
    # Equals x.contiguous(memory_format=torch.channels_last), which torch.vmap does not support.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class SuperResolver(nn.Module):
    """Base class of the super-resolution networks: scale, normalisation, fusing, and loading of published files.

    Args:
        num_features: Number of hidden channels C.
        scale: Factor r by which height and width grow.
        in_chans: Image channels, 1 to 4.
        out_chans: Output channels, 1 to 4; None: as the input.
        radius: Receptive field: largest distance of an input pixel that an output pixel depends on, in input pixels.
        norm: Normalise the input; None if no network of the class does. False adds an entry `no_norm` to the state
            dict, since the shapes do not reveal it.
        img_range: See `Normalisation`.

    Raises:
        InputError: `scale` or `num_features` is below 1, or a number of channels is not 1 to 4.
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
            raise InputError(f"in_chans and out_chans must be 1 to 4; got {in_chans} and {self.out_chans}.")
        if scale < 1 or num_features < 1:
            raise InputError(f"scale and width must be at least 1; got {scale} and {num_features}.")
        self.norm = Normalisation(in_chans, img_range, device, dtype) if norm else nn.Identity()
        if norm is False:
            self.register_buffer("no_norm", torch.zeros(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_take_published)

    def _load_from_state_dict(self, state_dict, *args):
        # With assign=True weights move from the meta device to that of the file; so does the mean, which files lack.
        if isinstance(self.norm, Normalisation) and self.norm.mean.is_meta and state_dict:
            self.norm.mean = torch.empty_like(self.norm.mean, device=next(iter(state_dict.values())).device)
        super()._load_from_state_dict(state_dict, *args)

    @torch.jit.ignore
    def fuse(self) -> "SuperResolver":
        """Merge the branches of every convolution into one convolution, computed in float64, and delete them."""
        for module in self.modules():
            if isinstance(module, Conv3XC):
                module.fuse()
        return self

    @torch.jit.ignore
    def unfuse(self) -> "SuperResolver":
        """Replace every fused convolution by equivalent branches, for further training."""
        for module in list(self.modules()):
            if isinstance(module, Conv3XC):
                module.unfuse()
        return self


Network = TypeVar("Network", bound=SuperResolver)


def _take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: convert a state dict of another layout or form to the model's."""
    own = layouts.adapt(state, model.state_dict(), prefix)
    if own is not state:
        state.clear()
        state.update(own)


class SPAN(SuperResolver):
    """Swift parameter-free attention network (equations and variants: see the module).

    Args:
        width: Number of channels C.
        scale: Factor r by which height and width grow.
        in_chans: Image channels, 1 to 4.
        out_chans: Output channels, 1 to 4; None: as the input.
        cat_width: Channels of z; None: C. A pruned network has fewer.
        branches: Build the training form.
        norm: Normalise the input; False for published files without normalisation.
        img_range: Range R that the input is scaled to.

    Shape:
        (B, in_chans, H, W) in 0..1 -> (B, out_chans, rH, rW), not clamped, any H and W.

    Raises:
        InputError: `scale` or `width` is below 1, or a number of channels is not 1 to 4.
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
        """Initialise the network close to bilinear interpolation.

        The first channels of f0 and of z carry the image. With PyTorch's default initialisation the network outputs
        noise, which training would have to remove first.
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


default_cfgs = generate_default_cfgs(
    {
        **{f"va_span_ch{width}_x{scale}.untrained": _cfg() for width in WIDTHS for scale in SCALES},
        **{
            f"va_span_ch26_x{scale}.wallpapers": _cfg(file=str(SHIPPED / f"va_span_ch26_x{scale}.safetensors"))
            for scale in SCALES
        },
        **{
            f"va_span_ch26_x{scale}.real": _cfg(file=str(SHIPPED / f"va_span_ch26_x{scale}.real.safetensors"))
            for scale in (2, 4)
        },
    }
)


def build(network: type[Network], name: str, pretrained: bool, settings: dict[str, Any]) -> Network:
    """Build a network by timm's rules, which pass `num_classes`, here 0, to every model."""
    if settings.get("num_classes"):
        raise TypeError(f"{name} has no classes: num_classes must be 0; got {settings['num_classes']}.")
    channels = {key: settings.get(key) for key in ("in_chans", "out_chans")}
    if pretrained and any(count not in (None, 3) for count in channels.values()):
        given = ", ".join(f"{key}={count}" for key, count in channels.items() if count is not None)
        raise InputError(f"The weights of {name} are for images of 3 channels; got {given}: use pretrained=False.")
    return build_model_with_cfg(network, name, pretrained, kwargs_filter=("num_classes",), **settings)


def _entry_point(width: int, scale: int) -> Callable[..., SPAN]:
    """Create the entry point of a width and scale; timm registers it under the function's name."""
    name = f"va_span_ch{width}_x{scale}"

    def entry_point(pretrained: bool = False, **kwargs: Any) -> SPAN:
        return build(SPAN, name, pretrained, {"width": width, "scale": scale, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"SPAN of {width} channels for a scale of {scale}: {WIDTHS[width]}."
    return register_model(entry_point)


for _width in WIDTHS:
    for _scale in SCALES:
        globals()[f"va_span_ch{_width}_x{_scale}"] = _entry_point(_width, _scale)
