"""Layouts of MatchStereo and MatchFlow files: identification of the network, and conversion to our names.

The authors' files hold, under "model", 646 tensors for 26 layers:

    theirs                                           ours
    encoder.downsample_layers.0.{0,3}                encoder.stem.{0,3}
    encoder.downsample_layers.{i}, i = 1 .. 3        encoder.downsamplings.{i - 1}
    init_correlation_volume                          start
    match_attentions.{i}.layers.{j}                  decoder.{i}.{j}
    ....match_attention_cross.g.0                    ....match_attention_cross.g
    up_decoders.{i}, i = 1 .. 3                      fusions.{i - 1}
    up_masks.{i}, i = 1 .. 4                         upsamplings.{i - 1}.mask
    encoder.head, encoder.stages.{i}.{j}.res_scale*  18 unused tensors: left out

All other names are equal. Shapes do not distinguish stereo from flow: our files of flow networks contain an entry
`flow` with one element; the authors' files are taken for stereo, as three of the four published ones are, unless a
model name states otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionattn.errors import CheckpointError
from visionattn.weights.reading import unwrap

__all__ = ["VARIANTS", "adapt", "convert", "identify"]

# Widths and blocks of the encoder at 1/4 to 1/32, layers of the decoder at 1/32 to 1/4.
VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "nano": {"widths": (16, 32, 64, 128), "encoder_depths": (2, 2, 4, 1), "depths": (0, 2, 4, 1)},
    "tiny": {"widths": (32, 64, 128, 160), "encoder_depths": (2, 2, 6, 2), "depths": (8, 8, 8, 2)},
    "small": {"widths": (64, 128, 160, 320), "encoder_depths": (2, 2, 6, 2), "depths": (8, 8, 8, 2)},
    "base": {"widths": (128, 256, 320, 512), "encoder_depths": (2, 2, 6, 2), "depths": (8, 8, 8, 2)},
}
# Existing model names; a network of other widths gets the first name, with its widths as arguments.
NAMES = {"stereo": ("tiny", "nano", "small", "base"), "flow": ("tiny", "nano", "base")}
SIGN, OUR_SIGN = "init_correlation_volume.q.weight", "start.q.weight"
UNREAD = re.compile(r"encoder\.head\.|encoder\.stages\.\d+\.\d+\.res_scale")
PLACES = {
    r"encoder\.downsample_layers\.0\.": "encoder.stem.",
    r"encoder\.downsample_layers\.(\d+)\.": "encoder.downsamplings.{}.",
    r"init_correlation_volume\.": "start.",
    r"match_attentions\.(\d+)\.layers\.": "decoder.{}.",
    r"up_decoders\.(\d+)\.": "fusions.{}.",
    r"up_masks\.(\d+)\.": "upsamplings.{}.mask.",
}
FROM_ONE = ("encoder.downsamplings", "fusions", "upsamplings")  # the authors count these from 1


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' weights to our names, without unused ones; other state dicts are returned as they are."""
    if SIGN not in state:
        return dict(state)
    return {_our_key(key): value for key, value in state.items() if not UNREAD.match(key)}


def _our_key(key: str) -> str:
    for pattern, place in PLACES.items():
        if found := re.match(pattern, key):
            first = 1 if place.startswith(FROM_ONE) else 0
            key = place.format(*[int(number) - first for number in found.groups()]) + key[found.end() :]
            break
    return key.replace("_cross.g.0.", "_cross.g.")


def identify(state: Mapping[str, Tensor], name: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Find the model name and its arguments for the weights of a MatchStereo or a MatchFlow.

    Args:
        state: Weights in either layout (see the module), without wrappers.
        name: Model that the weights belong to, if known.

    Returns:
        Name and arguments, or None for a network of another family.

    Raises:
        CheckpointError: The weights are of this family, but some are missing.
    """
    own = convert(state)
    if OUR_SIGN not in own:
        return None
    sizes: dict[str, tuple[int, ...]] = {
        "widths": tuple(_channels(own, f"encoder.stages.{stage}.0.norm1.weight") for stage in range(4)),
        "encoder_depths": tuple(_count(own, f"encoder.stages.{stage}") for stage in range(4)),
        "depths": tuple(_count(own, f"decoder.{scale}") for scale in range(4)),
    }
    task = "flow" if "flow" in own else "stereo"
    if name is not None and name.startswith("va_match_flow"):
        task = "flow"
    names = NAMES[task]
    variant = next((size for size in names if VARIANTS[size]["widths"] == sizes["widths"]), names[0])
    return f"va_match_{task}_{variant}", {key: n for key, n in sizes.items() if n != VARIANTS[variant][key]}


def _channels(own: Mapping[str, Tensor], key: str) -> int:
    if key not in own:
        raise CheckpointError(f"The weights look like a MatchStereo's, but {key} is missing.")
    return own[key].shape[0]


def _count(own: Mapping[str, Tensor], place: str) -> int:
    """Number of layers under a prefix of keys."""
    pattern = re.compile(re.escape(place) + r"\.(\d+)\.")
    return len({found[1] for key in own if (found := pattern.match(key))})


def _layer(key: str) -> str:
    """Prefix of the decoder layer that a key belongs to; empty for other keys."""
    found = re.match(r"decoder\.\d+\.\d+\.", key)
    return found[0] if found else ""


def adapt(state: Mapping[str, Any], wanted: Mapping[str, Tensor], prefix: str = "") -> Mapping[str, Any]:
    """Convert weights to the names of a model, and keep only as many layers per scale as it has.

    Args:
        state: Weights in either layout (see the module); wrappers such as `model` are opened.
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
    if OUR_SIGN not in own or OUR_SIGN not in wanted:
        return state
    layers = {_layer(key) for key in wanted}
    own = {key: value for key, value in own.items() if _layer(key) in layers}
    if "flow" in wanted and SIGN in inner:
        own["flow"] = torch.zeros(1)
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return others | {prefix + key: value for key, value in own.items()}
