"""Layouts of SPAN files and those of its successors: identification of the network, and conversion to our names.

    published                                          keys of one 3 x 3 convolution P
    authors' repository, BasicSR, neosr, spandrel      P.sk, P.conv.0, P.conv.1, P.conv.2, and P.eval_conv
    fused ("slim"), pruned; SPANF and ESPAN            P.eval_conv
    SPANV2                                             P.conv
    ncnn, a .param and a .bin file                     see `visionattn.weights.ncnn`

Ours has P.conv for a fused convolution, and P.skip, P.expand, P.mix, P.project for one in branches. Published files
with branches also contain P.eval_conv, which is stale in files saved during training and is therefore never read.

Shapes do not reveal the normalisation: the entry `no_norm`, with one element, marks a network without it;
`norm.img_range`, in our files only, is the range that images are scaled to if it is not 255.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import CheckpointError
from visionattn.weights.ncnn import RGB_MEAN, read_ncnn
from visionattn.weights.reading import unwrap

__all__ = ["RGB_MEAN", "adapt", "convert", "fuse", "identify", "read_ncnn", "to_official", "unfuse"]

# Keys that identify the files of each network, in published layouts and in ours.
SIGNS = {
    "spanf": ("conv_near.weight", "conv_cat.weight"),
    "espan": ("tea_conv_cat.weight", "tea_upsampler.0.eval_conv.weight"),
    "spanv2": ("block_2.guidance_map_conv.weight", "pointwise_conv.weight"),
    "span": ("conv_cat.weight", "upsampler.0.weight", "conv_2.eval_conv.weight|conv_2.sk.weight"),
}
OUR_SIGNS = {
    "spanf": ("first.conv1.conv.weight|first.conv1.mix.weight", "near.weight"),
    "espan": ("last.conv1.conv.weight|last.conv1.mix.weight", "conv_cat.weight"),
    "spanv2": ("blocks.1.gate.weight", "pointwise.weight"),
    "span": ("blocks.5.conv3.conv.weight|blocks.5.conv3.mix.weight", "conv_cat.weight", "upsampler.weight"),
}
# Published name of a layer -> ours; published blocks are numbered from 1.
PLACES = {
    "span": {r"block_(\d+)\.c(\d)_r": "blocks.{}.conv{}", r"upsampler\.0": "upsampler"},
    "spanf": {
        r"block_1\.c(\d)_r": "first.conv{}",
        r"block_(\d+)\.c(\d)_r": "blocks.{}.conv{}",
        "conv_near": "near",
        "conv_2": "upsampler",
    },
    "espan": {
        r"conv_1\.eval_conv": "conv_1",
        r"block_(\d+)\.c(\d)_r": "blocks.{}.conv{}",
        r"teacher_block_seq\.c(\d)_r": "last.conv{}",
        r"tea_upsampler\.0": "upsampler",
        "tea_": "",
    },
    "spanv2": {
        r"block_(\d+)\.c(\d)\.conv": "blocks.{}.conv{}",
        r"block_(\d+)\.guidance_map_conv": "blocks.{}.gate",
        "conv_near": "near",
        "(depthwise|pointwise)_conv": "{}",
    },
}
FIRST_OF_BLOCKS = {"span": 1, "spanf": 2, "espan": 1, "spanv2": 1}
PARTS = {"eval_conv": "conv", "sk": "skip", "conv.0": "expand", "conv.1": "mix", "conv.2": "project"}
BRANCHES = ("skip", "expand", "mix", "project")
WIDTHS, SCALES = (26, 28, 32, 48, 52), (2, 3, 4)


def _has(state: Mapping[str, Any], signs: tuple[str, ...]) -> bool:
    return all(any(key in state for key in sign.split("|")) for sign in signs)


def _family(state: Mapping[str, Any], signs: dict[str, tuple[str, ...]]) -> str | None:
    return next((family for family, keys in signs.items() if _has(state, keys)), None)


def identify(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """Find the model name and its arguments for the weights of a SPAN or one of its successors.

    A width or scale without a model name of its own gives `va_span_ch48_x4` with the arguments `width` and `scale`.

    Args:
        state: Weights in any of the layouts (see the module), without wrappers.

    Returns:
        Name and arguments, or None for a network of another family.

    Raises:
        CheckpointError: It is a variant that is not supported, or its shapes contradict each other.
    """
    if any(key.startswith("feats.") and ".eval_conv." in key for key in state):
        raise CheckpointError(
            "This is a SPANPlus network, which is not supported: its blocks have Mish instead of SiLU."
        )
    own = convert(state)
    family = _family(own, OUR_SIGNS)
    if family is None:
        return None
    settings: dict[str, Any] = {}
    image, width_of, pixels_of = {
        "span": ("conv_1", "conv_1", "upsampler"),
        "spanf": ("first.conv1", "first.conv1", "near"),
        "espan": ("conv_1", "conv_1", "upsampler"),
        "spanv2": ("blocks.0.conv1", "blocks.0.conv1", "pointwise"),
    }[family]
    in_chans, width, pixels = _ends(own, image)[0], _ends(own, width_of)[1], _ends(own, pixels_of)[1]
    out_chans, scale = _scale(pixels, in_chans)
    if in_chans != 3:
        settings["in_chans"] = in_chans
    if out_chans != in_chans:
        settings["out_chans"] = out_chans
    if "no_norm" in own:
        settings["norm"] = False
    if "norm.img_range" in own:
        settings["img_range"] = own["norm.img_range"].item()
    if family != "span":
        settings |= {"width": width} if width != 32 else {}
        settings |= {"scale": scale} if scale != 4 else {}
        return f"va_{family}_x4", settings
    if (cat_width := own["conv_cat.weight"].shape[0]) != width:
        settings["cat_width"] = cat_width
    if width in WIDTHS and scale in SCALES:
        return f"va_span_ch{width}_x{scale}", settings
    return "va_span_ch48_x4", {"width": width, "scale": scale, **settings}


def _ends(own: Mapping[str, Tensor], layer: str) -> tuple[int, int]:
    """Input and output channels of a layer, fused or in branches."""
    for name in (f"{layer}.weight", f"{layer}.conv.weight", f"{layer}.skip.weight"):
        if name in own and own[name].ndim == 4:
            return own[name].shape[1], own[name].shape[0]
    raise CheckpointError(f"The weights look like a SPAN's, but those of {layer} are missing.")


def _scale(pixels: int, in_chans: int) -> tuple[int, int]:
    """Output channels and scale such that `pixels` = out_chans * scale^2; preferably as many channels as the input."""
    for out_chans in (in_chans, 3, 1, 4, 2):
        scale = math.isqrt(pixels // out_chans)
        if scale and out_chans * scale**2 == pixels:
            return out_chans, scale
    raise CheckpointError(f"The last convolution has {pixels} outputs, not 1 to 4 channels times a squared scale.")


def convert(state: Mapping[str, Tensor], branches: bool | None = None) -> dict[str, Tensor]:
    """Rename published weights to our names; other state dicts keep their names.

    Args:
        state: Weights in any of the layouts (see the module), without wrappers.
        branches: True: 3 x 3 convolutions in branches; False: fused; None: as they are.

    Returns:
        A new state dict.
    """
    family = _family(state, SIGNS)
    own = dict(state)
    if family is not None:
        own = {}
        for key, value in state.items():
            layer, dot, end = key.rpartition(".")
            trained_apart = layer.endswith(".eval_conv") and f"{layer.removesuffix('eval_conv')}sk.weight" in state
            if not trained_apart:
                own[_our_layer(layer, family) + dot + end] = value
    if "no_norm" in own:
        own["no_norm"] = torch.zeros(1)
    if branches is None:
        return own
    return unfuse(own) if branches else fuse(own)


def _our_layer(layer: str, family: str) -> str:
    for pattern, place in PLACES[family].items():
        if found := re.match(pattern, layer):
            numbers = list(found.groups())
            if place.startswith("blocks."):
                numbers[0] = str(int(numbers[0]) - FIRST_OF_BLOCKS[family])
            layer = place.format(*numbers) + layer[found.end() :]
            break
    for theirs, ours in PARTS.items():
        if layer.endswith(f".{theirs}"):
            return layer.removesuffix(theirs) + ours
    return layer


def _layers(own: Mapping[str, Tensor], part: str) -> list[str]:
    return [key.removesuffix(f".{part}.weight") for key in own if key.endswith(f".{part}.weight")]


def fuse(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fuse the branches of every 3 x 3 convolution (equations: `visionattn.blocks.span`), computed in float64.

    The result has the dtype of the branches, or float32 if that is wider.
    """
    fused = dict(own)
    for layer in _layers(own, "mix"):
        names = {(part, kind): f"{layer}.{part}.{kind}" for part in BRANCHES for kind in ("weight", "bias")}
        if not all(name in own for name in names.values()):
            continue  # an incomplete file: the caller names what is missing
        ws, w1, w2, w3 = (own[names[part, "weight"]].double() for part in BRANCHES)
        bs, b1, b2, b3 = (own[names[part, "bias"]].double() for part in BRANCHES)
        dtype = torch.promote_types(own[names["mix", "weight"]].dtype, torch.float32)
        weight = torch.einsum("ob,bauv,ai->oiuv", w3.flatten(1), w2, w1.flatten(1))
        weight[:, :, 1, 1] += ws.flatten(1)
        bias = w3.flatten(1) @ (b2 + w2.sum((2, 3)) @ b1) + b3 + bs
        for name in names.values():
            del fused[name]
        fused |= {f"{layer}.conv.weight": weight.to(dtype), f"{layer}.conv.bias": bias.to(dtype)}
    return fused


def unfuse(own: Mapping[str, Tensor], gain: int = 2) -> dict[str, Tensor]:
    """Replace every fused 3 x 3 convolution by exactly equivalent branches, `gain` times as wide.

    All branches receive gradients: the inner ones contain copies of the convolution, and the last selects the first.
    """
    wide = dict(own)
    for layer in _layers(own, "conv"):
        weight, bias = own[f"{layer}.conv.weight"], own.get(f"{layer}.conv.bias")
        if bias is None:
            continue
        out_chans, in_chans = weight.shape[:2]
        copies = weight.new_zeros(gain, out_chans, gain, in_chans, 3, 3)
        copies[:, :, 0] = weight
        first = torch.eye(out_chans, gain * out_chans, dtype=weight.dtype, device=weight.device)
        branches = {
            "skip": (weight.new_zeros(out_chans, in_chans), torch.zeros_like(bias)),
            "expand": (
                torch.eye(in_chans, dtype=weight.dtype, device=weight.device).repeat(gain, 1),
                bias.new_zeros(gain * in_chans),
            ),
            "mix": (copies.view(gain * out_chans, gain * in_chans, 3, 3), bias.new_zeros(gain * out_chans)),
            "project": (first, bias.clone()),
        }
        del wide[f"{layer}.conv.weight"], wide[f"{layer}.conv.bias"]
        for part, (kernel, offset) in branches.items():
            wide[f"{layer}.{part}.weight"] = kernel if kernel.ndim == 4 else kernel[..., None, None]
            wide[f"{layer}.{part}.bias"] = offset
    return wide


def adapt(state: Mapping[str, Any], wanted: Mapping[str, Tensor], prefix: str = "") -> Mapping[str, Any]:
    """Convert weights to the names and the form, fused or in branches, of a model.

    Args:
        state: Weights in any of the layouts (see the module); wrappers such as `params_ema` are opened.
        wanted: State dict of the model, for its keys.
        prefix: Prefix of the model's keys in `state`; other entries are kept.

    Returns:
        `state` itself if it has the model's layout or belongs to another family; otherwise a new dictionary.
    """
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if set(inner) == set(wanted):
        return state
    if any(isinstance(value, Mapping) for value in inner.values()) or not prefix:
        try:
            inner = unwrap(inner)
        except CheckpointError:
            return state
    own = convert(inner)
    if _family(own, OUR_SIGNS) is None:
        return state
    own = unfuse(own) if any(key.endswith(".mix.weight") for key in wanted) else fuse(own)
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return others | {prefix + key: value for key, value in own.items()}


def to_official(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a SPAN to the authors' layout in branches, which spandrel, neosr and BasicSR read.

    What the layout cannot express is folded in exactly: a pruned `conv_cat` is padded with outputs of zeros, and an
    image range other than 255 is folded into the first convolution.

    Args:
        weights: A SPAN of any width and scale, or its state dict, in either form.

    Returns:
        State dict in the authors' layout.

    Raises:
        CheckpointError: It is not a SPAN, or the layout cannot express it.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    own = convert(state)
    if _family(own, OUR_SIGNS) != "span":
        raise CheckpointError("The weights must be those of a SPAN; these belong to another network.")
    wide, fused = unfuse(own), fuse(own)
    in_chans, width = _ends(own, "conv_1")
    cat_width = own["conv_cat.weight"].shape[0]
    if in_chans != 3 and "no_norm" not in own:
        raise CheckpointError(f"The authors' normalisation requires 3 channels; this network has {in_chans}.")
    if cat_width > width:
        raise CheckpointError(f"The authors' conv_cat has at most {width} outputs; this one has {cat_width}.")
    stretch = wide.pop("norm.img_range", torch.tensor(255.0)).item() / 255
    for key in ("conv_1.expand.weight", "conv_1.skip.weight"):
        wide[key] = wide[key] * stretch
    spare = width - cat_width
    for key, pad in {
        "conv_cat.weight": (0, 0) * 3 + (0, spare),
        "conv_cat.bias": (0, spare),
        "upsampler.weight": (0, 0) * 2 + (0, spare),
    }.items():
        wide[key] = nn.functional.pad(wide[key], pad)
    theirs = {ours: part for part, ours in PARTS.items()}
    official = {}
    for key, value in wide.items():
        layer, dot, end = key.rpartition(".")
        if layer.endswith(".skip"):  # once per convolution
            place = _their_place(layer.removesuffix(".skip"))
            kernel = fused[f"{layer.removesuffix('.skip')}.conv.{end}"]
            factor = stretch if key == "conv_1.skip.weight" else 1
            official[f"{place}.eval_conv.{end}"] = (kernel * factor).to(value.dtype)
        part = layer.rpartition(".")[2]
        if part in BRANCHES:
            layer = f"{_their_place(layer.removesuffix('.' + part))}.{theirs[part]}"
        elif layer == "upsampler":
            layer = "upsampler.0"
        official[layer + dot + end] = value
    return official


def _their_place(layer: str) -> str:
    return re.sub(r"blocks\.(\d+)\.conv(\d)", lambda found: f"block_{int(found[1]) + 1}.c{found[2]}_r", layer)
