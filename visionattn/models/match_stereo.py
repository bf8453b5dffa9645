"""MatchStereo and MatchFlow: where each pixel of a view lies in the other one, by attention to small windows around it.

Both views, 2 x - 1 of RGB in 0..1, go through all of it in one batch, the left ones first. The encoder E gives features
at 1/4, 1/8, 1/16 and 1/32 of the size, of C_1 to C_4 channels (equations: `visionattn.blocks.match_encoder`). The
decoder goes up again, with a field f and positions s of each head (equations: `visionattn.blocks.match_decoder`):

    f, s    = start(E_4), 0                                  x = E_4, the encoder's features at 1/32
    x, f, s = layer(x, f, s)                                 several at each size, s the mean of the heads between sizes
    f, s    = convex upsampling by 2 of [f, s]               weights from x
    x       = fusion of E at this size and x
    f       = convex upsampling by 4 of f                    after the last layer, at 1/4

Layers have 4 heads, with windows of radius 2 at 1/32 and 1/16, of 1 at 1/8 and 1/4. Variants (counted here: parameters,
and GMACs of matrix products and convolutions for a pair of 384 x 1248):

    name    C_1 C_2 C_3 C_4    encoder blocks  decoder layers  parameters   GMACs
                               1/4 to 1/32     1/32 to 1/4
    nano     16  32  64 128    2 2 4 1         0 2 4 1            976,574    5.36
    tiny     32  64 128 160    2 2 6 2         8 8 8 2          8,621,352   34.81
    small    64 128 160 320    2 2 6 2         8 8 8 2         24,907,048  100.66
    base    128 256 320 512    2 2 6 2         8 8 8 2         74,929,512  366.36

tiny, small and base have the paper's widths, without parameters of the authors' files that nothing reads; nano is ours:
at 1/32, where two layers of a trained one changed no field, it has none, and the start goes on as it is.
`depths` takes other numbers of layers, such as those of `FEWER_LAYERS`: a published file then gives its first ones.

Source: MatchAttention, arXiv 2510.14260. The authors upsample the field of the left view to full size, here both are.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model

from visionattn.blocks.match_decoder import ConvexUpsampling, CorrelationStart, MatchLayer
from visionattn.blocks.match_encoder import MatchEncoder, MatchFusion
from visionattn.errors import InputError
from visionattn.weights import SHIPPED
from visionattn.weights import match_stereo as layouts
from visionattn.weights.match_stereo import VARIANTS

__all__ = ["FEWER_LAYERS", "MatchFields", "MatchFlow", "MatchStereo"]

FEWER_LAYERS = ((6, 6, 4, 2), (4, 4, 4, 1), (2, 2, 2, 1), (1, 1, 1, 1))
NUM_HEADS = 4
RADII = (2, 2, 1, 1)
STRIDE, LEAST_UNITS = 32, 6  # a map at 1/32 holds the largest window


class MatchFields(NamedTuple):
    """All fields of a pass, for losses and warnings: (x, y) in pixels of their map, the B left views first.

    H' and W' are those of the padded images (see `MatchStereo.pad`); of maps smaller than the image none is cropped.

    Attributes:
        field: The result, (2B, H, W, 2), cropped to the images.
        start: (2B, H' / 32, W' / 32, 2).
        probability: P of the start, (2B, H' / 32, W' / 32, W' / 32), disparities last, or in flow (2B, N, N) over the N
            pixels at 1/32; None where the start was given.
        after_self: After the self attention of each layer, from 1/32 to 1/4, (2B, h, w, 2).
        after_cross: After the cross attention likewise.
        upsampled: Before the first layer at 1/16, 1/8 and 1/4.
    """

    field: torch.Tensor
    start: torch.Tensor
    probability: torch.Tensor | None
    after_self: list[torch.Tensor]
    after_cross: list[torch.Tensor]
    upsampled: list[torch.Tensor]


class MatchStereo(nn.Module):
    """Disparities of both views of a rectified stereo pair (equations and variants: see the module).

    The left view's pixel at x has its match in the right view at x minus its disparity, the right view's in the left
    view at x plus its disparity. Any disparity is possible.

    Args:
        widths: Channels C_1 to C_4, at 1/4 to 1/32. Multiples of 4, the first one of 2 heads.
        encoder_depths: Blocks of the encoder at 1/4 to 1/32.
        depths: Layers of the decoder at 1/32 to 1/4. Where a size has none, its field goes on as it came.

    Shape:
        left, right (B, 3, H, W), RGB in 0..1, start (2B, ceil(H / 32), ceil(W / 32), 2) or None -> (B, 2, H, W): the
        disparities of the left and the right view in pixels. H and W of 161 or more.

    Raises:
        InputError: Views that differ in size, are not RGB or are too small; a start of another shape; widths that heads
            do not divide, or lists of stages of other lengths than 4.
    """

    task = "stereo"
    input_names = ("left", "right")
    output_names = ("disparity",)
    decides = True
    size_multiple = 1
    size_minimum = STRIDE * (LEAST_UNITS - 1) + 1
    num_classes = 0

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 160),
        encoder_depths: tuple[int, ...] = (2, 2, 6, 2),
        depths: tuple[int, ...] = (8, 8, 8, 2),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not len(widths) == len(encoder_depths) == len(depths) == len(RADII):
            raise InputError(
                f"widths, encoder_depths and depths say something of each of 4 sizes, but have {len(widths)}, "
                f"{len(encoder_depths)} and {len(depths)} entries."
            )
        if (
            min(*widths, *encoder_depths, depths[-1]) < 1
            or min(depths) < 0
            or any(width % NUM_HEADS for width in widths)
        ):
            raise InputError(
                f"Widths are multiples of {NUM_HEADS}, each size has blocks, and the last one layers, but got widths "
                f"{widths}, encoder_depths {encoder_depths} and depths {depths}."
            )
        dd = {"device": device, "dtype": dtype}
        flow, up = self.task == "flow", widths[::-1]
        self.num_features = widths[0]
        self.grad_checkpointing = False
        self.encoder = MatchEncoder(widths, encoder_depths, **dd)
        self.start = CorrelationStart(up[0], flow, **dd)
        self.fusions = nn.ModuleList([MatchFusion(*pair, **dd) for pair in pairwise(up)])
        self.decoder = nn.ModuleList(
            [
                nn.ModuleList([MatchLayer(width, NUM_HEADS, radius, flow, **dd) for _ in range(n)])
                for width, radius, n in zip(up, RADII, depths)
            ]
        )
        self.upsamplings = nn.ModuleList(
            [*[ConvexUpsampling(width, **dd) for width in up[:-1]], ConvexUpsampling(up[-1], 4, 2 * up[-1], **dd)]
        )
        self.apply(_init_weights)
        self.register_load_state_dict_pre_hook(_take_published)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes between layers of the decoder, and compute them again for gradients."""
        self.grad_checkpointing = enable

    def pad(self, image: torch.Tensor) -> torch.Tensor:
        """Repeat the first row and the last column until the sides are multiples of 32."""
        H, W = image.shape[2:]
        whole_H, whole_W = (STRIDE * ((side + STRIDE - 1) // STRIDE) for side in (H, W))
        return F.pad(image, (0, whole_W - W, whole_H - H, 0), mode="replicate")

    def forward_fields(self, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | None = None) -> MatchFields:
        """Compute the fields of all layers (arguments: see the class)."""
        _check_views(left, right, self.size_minimum)
        maps = self.encoder(torch.cat([self.pad(left), self.pad(right)]))  # (2B, h, w, C) at 1/4 to 1/32
        x, probability = maps[-1], None
        if start is None:
            with _without_autocast(x.device.type):
                start, probability = self.start.match(x.to(self.start.q.weight.dtype))
        elif start.shape != (*x.shape[:3], 2):
            raise InputError(f"The start of these views is {(*x.shape[:3], 2)}, but got {tuple(start.shape)}.")
        field, positions = start, torch.zeros_like(start)
        after_self, after_cross, upsampled = [], [], []
        for number, layers in enumerate(self.decoder):
            if number > 0:
                both = self.upsamplings[number - 1](x, torch.cat([field, positions], -1))
                field, positions = both.split([2, 2], -1)
                upsampled.append(field)
                x = self.fusions[number - 1](maps[-1 - number], x)
            positions = positions.repeat(1, 1, 1, NUM_HEADS)
            for layer in layers.children():
                if self.grad_checkpointing and torch.is_grad_enabled():
                    found = checkpoint(layer, x, field, positions)
                else:
                    found = layer(x, field, positions)
                x, field_self, field, positions = found
                after_self.append(field_self)
                after_cross.append(field)
            positions = positions.unflatten(-1, (NUM_HEADS, 2)).mean(-2)
        field = self.upsamplings[-1](x, field)
        field = field[:, field.shape[1] - left.shape[2] :, : left.shape[3]]
        return MatchFields(field, start, probability, after_self, after_cross, upsampled)

    def low_resolution_start(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Find a start in images of half the size, better for images of 2K and more.

        Args:
            left: (B, 3, H, W), as of the class, H and W of 321 or more.
            right: Likewise.

        Returns:
            (2B, ceil(H / 32), ceil(W / 32), 2), for `start` of the call.

        Raises:
            InputError: See the class.
        """
        _check_views(left, right, 2 * self.size_minimum - 1)
        halves = [F.interpolate(self.pad(view), scale_factor=0.5, mode="bilinear") for view in (left, right)]
        field = self.forward_fields(*halves).field.permute(0, 3, 1, 2)
        units = [side * 2 // STRIDE for side in field.shape[2:]]
        start = F.interpolate(field, units, mode="bilinear", align_corners=True) * (2 / STRIDE)
        return start.permute(0, 2, 3, 1)

    def forward(self, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W), (B, 3, H, W) -> (B, 2, H, W)."""
        x = self.forward_fields(left, right, start).field[..., 0]
        return torch.stack([-x[: left.shape[0]], x[left.shape[0] :]], 1).clamp(min=0)


class MatchFlow(MatchStereo):
    """Optical flow between two images, both ways (equations and variants: see the module).

    Args:
        widths: See `MatchStereo`, as all that follow.
        encoder_depths: Blocks of the encoder.
        depths: Layers of the decoder.

    Shape:
        first, second (B, 3, H, W), RGB in 0..1, start (2B, ceil(H / 32), ceil(W / 32), 2) or None -> (B, 4, H, W): x
        and y in pixels from the first image to the second, then from the second to the first. H and W of 161 or more.

    Raises:
        InputError: See `MatchStereo`.
    """

    task = "flow"
    input_names = ("first", "second")
    output_names = ("flow",)

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 160),
        encoder_depths: tuple[int, ...] = (2, 2, 6, 2),
        depths: tuple[int, ...] = (8, 8, 8, 2),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(widths, encoder_depths, depths, device, dtype)
        # No shape tells it from a stereo network.
        self.register_buffer("flow", torch.zeros(1, device=device, dtype=dtype))

    def forward(self, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W), (B, 3, H, W) -> (B, 4, H, W)."""
        field = self.forward_fields(left, right, start).field.permute(0, 3, 1, 2)
        return torch.cat([field[: left.shape[0]], field[left.shape[0] :]], 1)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Scores of the start are not rounded: the argmax over them would jump. The meta device knows no autocast."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check_views(left: torch.Tensor, right: torch.Tensor, minimum: int) -> None:
    if left.ndim != 4 or right.ndim != 4 or left.shape[1] != 3 or right.shape[1] != 3:
        raise InputError(
            f"Views are RGB images (B, 3, H, W) in 0..1, but got {tuple(left.shape)} and {tuple(right.shape)}."
        )
    if left.shape != right.shape:
        raise InputError(
            f"Both views have one size, but got {tuple(left.shape)} and {tuple(right.shape)}. Crop or pad one of them."
        )
    if left.shape[2] < minimum or left.shape[3] < minimum:
        raise InputError(
            f"Views are at least {minimum} pixels high and wide, but got {left.shape[2]} x {left.shape[3]}. Enlarge "
            "them, and divide what is found by the same factor."
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: what has the authors' layout becomes what the model has."""
    own = layouts.adapt(state, model.state_dict(), prefix)
    if own is not state:
        state.clear()
        state.update(own)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 320, 736),
        "num_classes": -1,  # no classifier
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "encoder.stem.0",
        "classifier": None,
        "paper_ids": "arXiv:2510.14260",
        "paper_name": "Matching the Relative Positions for High-Resolution Cross-View Matching",
        "license": "apache-2.0",
        **kwargs,
    }


def _published(filename: str) -> dict[str, Any]:
    """The authors' weights at their own place; their licence is not stated."""
    return _cfg(hf_hub_id="Tingman/MatchAttention", hf_hub_filename=filename, license="not stated")


default_cfgs = generate_default_cfgs(
    {
        "va_match_stereo_nano.generated": _cfg(file=str(SHIPPED / "va_match_stereo_nano.safetensors")),
        "va_match_stereo_tiny.fsd": _published("matchstereo_tiny_fsd.pth"),
        "va_match_stereo_small.fsd": _published("matchstereo_small_fsd.pth"),
        "va_match_stereo_base.fsd": _published("matchstereo_base_fsd.pth"),
        "va_match_flow_tiny.untrained": _cfg(),
        "va_match_flow_base.sintel": _published("matchflow_base_sintel.pth"),
    }
)

Network = TypeVar("Network", bound=MatchStereo)


def _build(network: type[Network], name: str, pretrained: bool, settings: dict[str, Any]) -> Network:
    """Make a network by timm's rules, which say the classes, here 0, and the image channels of every model."""
    for key, only in {"num_classes": 0, "in_chans": 3}.items():
        if settings.get(key, only) != only:
            raise TypeError(f"{name} compares RGB images and has no classes, but got {key}={settings[key]}.")
    settings = {**VARIANTS[name.rpartition("_")[2]], **settings}
    return build_model_with_cfg(network, name, pretrained, kwargs_filter=("num_classes", "in_chans"), **settings)


@register_model
def va_match_stereo_nano(pretrained: bool = False, **kwargs: Any) -> MatchStereo:
    """MatchStereo for CPUs."""
    return _build(MatchStereo, "va_match_stereo_nano", pretrained, kwargs)


@register_model
def va_match_stereo_tiny(pretrained: bool = False, **kwargs: Any) -> MatchStereo:
    """MatchStereo-T."""
    return _build(MatchStereo, "va_match_stereo_tiny", pretrained, kwargs)


@register_model
def va_match_stereo_small(pretrained: bool = False, **kwargs: Any) -> MatchStereo:
    """MatchStereo-S."""
    return _build(MatchStereo, "va_match_stereo_small", pretrained, kwargs)


@register_model
def va_match_stereo_base(pretrained: bool = False, **kwargs: Any) -> MatchStereo:
    """MatchStereo-B."""
    return _build(MatchStereo, "va_match_stereo_base", pretrained, kwargs)


@register_model
def va_match_flow_tiny(pretrained: bool = False, **kwargs: Any) -> MatchFlow:
    """MatchFlow-T."""
    return _build(MatchFlow, "va_match_flow_tiny", pretrained, kwargs)


@register_model
def va_match_flow_base(pretrained: bool = False, **kwargs: Any) -> MatchFlow:
    """MatchFlow-B."""
    return _build(MatchFlow, "va_match_flow_base", pretrained, kwargs)
