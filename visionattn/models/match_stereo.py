"""MatchStereo and MatchFlow: dense matching of two views by attention to small windows around the current match.

Both views, 2 x - 1 of RGB in 0..1, form one batch, the left views first. The encoder E computes features at 1/4, 1/8,
1/16 and 1/32 of the resolution, with C_1 to C_4 channels (equations: `visionattn.blocks.match_encoder`). The decoder
refines a field f and the positions s of each head from 1/32 to 1/4 (equations: `visionattn.blocks.match_decoder`):

    f, s    = start(E_4), 0                                  x = E_4, the encoder's features at 1/32
    x, f, s = layer(x, f, s)                                 several per scale; s is averaged over heads between scales
    f, s    = convex upsampling by 2 of [f, s]               weights from x
    x       = fusion of E at this scale and x
    f       = convex upsampling by 4 of f                    after the last layer, at 1/4

Layers have 4 heads, with windows of radius 2 at 1/32 and 1/16 and radius 1 at 1/8 and 1/4. Variants (parameters, and
GMACs of matrix products and convolutions for a pair of 384 x 1248 pixels, both counted here):

    name    C_1 C_2 C_3 C_4    encoder blocks  decoder layers  parameters   GMACs
                               1/4 to 1/32     1/32 to 1/4
    nano     16  32  64 128    2 2 4 1         0 2 4 1            976,574    5.36
    tiny     32  64 128 160    2 2 6 2         8 8 8 2          8,621,352   34.81
    small    64 128 160 320    2 2 6 2         8 8 8 2         24,907,048  100.66
    base    128 256 320 512    2 2 6 2         8 8 8 2         74,929,512  366.36

tiny, small and base have the paper's widths, without the unused parameters of the authors' files. nano is ours: it has
no layers at 1/32, because two layers there did not change the field of a trained network.
`depths` accepts other numbers of layers, such as those of `FEWER_LAYERS`; a published file then fills the first ones.

Source: MatchAttention, arXiv 2510.14260. The authors upsample only the field of the left view to full resolution; here
both fields are upsampled.
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
    """All fields of a forward pass, for losses and diagnostics: (x, y) in pixels of their map, the B left views first.

    H' and W' are the sides of the padded images (see `MatchStereo.pad`); only `field` is cropped.

    Attributes:
        field: The result, (2B, H, W, 2), cropped to the images.
        start: Initial field at 1/32, (2B, H' / 32, W' / 32, 2).
        probability: Matching probability P of the start, (2B, H' / 32, W' / 32, W' / 32) with disparities last, or for
            flow (2B, N, N) over the N pixels at 1/32; None if the start was given.
        after_self: Fields after the self-attention of each layer, from 1/32 to 1/4, (2B, h, w, 2).
        after_cross: Fields after the cross-attention of each layer, with the same shapes.
        upsampled: Fields before the first layer at 1/16, 1/8 and 1/4.
    """

    field: torch.Tensor
    start: torch.Tensor
    probability: torch.Tensor | None
    after_self: list[torch.Tensor]
    after_cross: list[torch.Tensor]
    upsampled: list[torch.Tensor]


class MatchStereo(nn.Module):
    """Disparities of both views of a rectified stereo pair (equations and variants: see the module).

    A pixel of the left view at x matches the right view at x minus its disparity; a pixel of the right view matches the
    left view at x plus its disparity. The range of disparities is not limited.

    Args:
        widths: Channels C_1 to C_4 at 1/4 to 1/32, multiples of 4.
        encoder_depths: Blocks of the encoder at 1/4 to 1/32.
        depths: Layers of the decoder at 1/32 to 1/4. A scale without layers leaves the field unchanged.
        border: Columns by which both views are extended to the left and to the right, a multiple of 32. They repeat the
            outermost column, and results are cropped. A band of the left view has its matches beyond the left side of
            the right view: with a border, windows can be centred there.

    Shape:
        left, right (B, 3, H, W), RGB in 0..1, start (2B, ceil(H / 32), ceil(W / 32) + border / 16, 2) or None ->
        (B, 2, H, W): the disparities of the left and the right view in pixels. H and W are at least 161.

    Raises:
        InputError: The views differ in size, are not RGB or are too small; the start has another shape; a width is not
            divisible by 4; or a list does not have 4 entries.
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
        border: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if border < 0 or border % STRIDE:
            raise InputError(f"border must be a multiple of {STRIDE}; got {border}.")
        if not len(widths) == len(encoder_depths) == len(depths) == len(RADII):
            raise InputError(
                f"widths, encoder_depths and depths must have 4 entries, one per scale; got {len(widths)}, "
                f"{len(encoder_depths)} and {len(depths)} entries."
            )
        if (
            min(*widths, *encoder_depths, depths[-1]) < 1
            or min(depths) < 0
            or any(width % NUM_HEADS for width in widths)
        ):
            raise InputError(
                f"widths must be divisible by {NUM_HEADS}, and encoder_depths and the last of depths at least 1; got "
                f"{widths}, {encoder_depths} and {depths}."
            )
        dd = {"device": device, "dtype": dtype}
        flow, up = self.task == "flow", widths[::-1]
        self.num_features = widths[0]
        self.grad_checkpointing = False
        self.border = border
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
        """Enable activation checkpointing in the decoder: activations are recomputed in the backward pass."""
        self.grad_checkpointing = enable

    def pad(self, image: torch.Tensor) -> torch.Tensor:
        """Repeat the first row and the last column until the sides are multiples of 32; then add the border."""
        H, W = image.shape[2:]
        whole_H, whole_W = (STRIDE * ((side + STRIDE - 1) // STRIDE) for side in (H, W))
        return F.pad(image, (self.border, whole_W - W + self.border, whole_H - H, 0), mode="replicate")

    def forward_fields(self, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | None = None) -> MatchFields:
        """Compute the fields of all layers (arguments: see the class)."""
        _check_views(left, right, self.size_minimum)
        maps = self.encoder(torch.cat([self.pad(left), self.pad(right)]))  # (2B, h, w, C) at 1/4 to 1/32
        x, probability = maps[-1], None
        if start is None:
            with _without_autocast(x.device.type):
                start, probability = self.start.match(x.to(self.start.q.weight.dtype))
        elif start.shape != (*x.shape[:3], 2):
            raise InputError(f"start must have the shape {(*x.shape[:3], 2)}; got {tuple(start.shape)}.")
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
        field = field[:, field.shape[1] - left.shape[2] :, self.border : self.border + left.shape[3]]
        return MatchFields(field, start, probability, after_self, after_cross, upsampled)

    def low_resolution_start(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Compute a start at half the resolution, which is better for images of 2K and more.

        Args:
            left: Left views (B, 3, H, W), RGB in 0..1, H and W at least 321.
            right: Right views, as `left`.

        Returns:
            (2B, ceil(H / 32), ceil(W / 32), 2), the argument `start` of `forward`.

        Raises:
            InputError: The views differ in size, are not RGB or are too small.
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
    """Optical flow between two images, in both directions (equations and variants: see the module).

    Args:
        widths: See `MatchStereo`.
        encoder_depths: See `MatchStereo`.
        depths: See `MatchStereo`.
        border: See `MatchStereo`.

    Shape:
        first, second (B, 3, H, W), RGB in 0..1, start as in `MatchStereo` or None -> (B, 4, H, W): x and y in pixels
        from the first image to the second, then from the second to the first. H and W are at least 161.

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
        border: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(widths, encoder_depths, depths, border, device, dtype)
        # Marks the state dict: its shapes equal those of a stereo network.
        self.register_buffer("flow", torch.zeros(1, device=device, dtype=dtype))

    def forward(self, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W), (B, 3, H, W) -> (B, 4, H, W)."""
        field = self.forward_fields(left, right, start).field.permute(0, 3, 1, 2)
        return torch.cat([field[: left.shape[0]], field[left.shape[0] :]], 1)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Keep the scores of the start in full precision, since rounding would change their argmax."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _check_views(left: torch.Tensor, right: torch.Tensor, minimum: int) -> None:
    if left.ndim != 4 or right.ndim != 4 or left.shape[1] != 3 or right.shape[1] != 3:
        raise InputError(
            f"Views must be RGB images (B, 3, H, W) in 0..1; got {tuple(left.shape)} and {tuple(right.shape)}."
        )
    if left.shape != right.shape:
        raise InputError(
            f"Both views must have the same size; got {tuple(left.shape)} and {tuple(right.shape)}: crop or pad one."
        )
    if left.shape[2] < minimum or left.shape[3] < minimum:
        raise InputError(
            f"Views must be at least {minimum} pixels high and wide; got {left.shape[2]} x {left.shape[3]}: enlarge "
            "them, and divide the result by the same factor."
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: convert a state dict in the authors' layout to the model's."""
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
    """The authors' weights in their own repository; their licence is not stated."""
    return _cfg(hf_hub_id="Tingman/MatchAttention", hf_hub_filename=filename, license="not stated")


default_cfgs = generate_default_cfgs(
    {
        "va_match_stereo_nano.generated": _cfg(file=str(SHIPPED / "va_match_stereo_nano.safetensors")),
        "va_match_stereo_tiny.fsd": _published("matchstereo_tiny_fsd.pth"),
        "va_match_stereo_small.fsd": _published("matchstereo_small_fsd.pth"),
        "va_match_stereo_base.fsd": _published("matchstereo_base_fsd.pth"),
        "va_match_flow_nano.generated": _cfg(file=str(SHIPPED / "va_match_flow_nano.safetensors")),
        "va_match_flow_tiny.untrained": _cfg(),
        "va_match_flow_base.sintel": _published("matchflow_base_sintel.pth"),
    }
)

Network = TypeVar("Network", bound=MatchStereo)


def _build(network: type[Network], name: str, pretrained: bool, settings: dict[str, Any]) -> Network:
    """Build a network by timm's rules, which pass `num_classes`, here 0, and `in_chans` to every model."""
    for key, only in {"num_classes": 0, "in_chans": 3}.items():
        if settings.get(key, only) != only:
            raise TypeError(f"{name} matches RGB images and has no classes: {key} must be {only}; got {settings[key]}.")
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
def va_match_flow_nano(pretrained: bool = False, **kwargs: Any) -> MatchFlow:
    """MatchFlow for CPUs."""
    return _build(MatchFlow, "va_match_flow_nano", pretrained, kwargs)


@register_model
def va_match_flow_tiny(pretrained: bool = False, **kwargs: Any) -> MatchFlow:
    """MatchFlow-T."""
    return _build(MatchFlow, "va_match_flow_tiny", pretrained, kwargs)


@register_model
def va_match_flow_base(pretrained: bool = False, **kwargs: Any) -> MatchFlow:
    """MatchFlow-B."""
    return _build(MatchFlow, "va_match_flow_base", pretrained, kwargs)
