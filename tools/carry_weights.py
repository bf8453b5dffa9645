"""Transfer the weights of a network to a similar one, for further training.

    python -m tools.carry_weights FILE va_match_stereo_nano NEW.safetensors
    python -m tools.carry_weights FILE va_span_ch26_x3 NEW.safetensors --source va_span_ch26_x4
    python -m tools.carry_weights FILE va_match_flow_nano NEW.safetensors --source va_match_stereo_nano

A MatchStereo of other depths: at each scale, blocks and layers that exist in both keep their weights, surplus ones are
left out, and new ones start as the identity: the weights of their last linear layers are 0. A SPAN of another scale:
the filters of the last convolution, one for each position in an enlarged pixel, are interpolated bilinearly. A
MatchFlow from a MatchStereo: the weights that update y, which stereo does not train, become those of x with the axes
of the attention's window exchanged, and 0 outside the window.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import visionattn
from visionattn.blocks.match_decoder import MatchLayer
from visionattn.files import atomic_path
from visionattn.models.match_stereo import MatchFlow

# The last linear layer of each residual branch, in the blocks of the encoder and the layers of the decoder.
LAST = re.compile(r"token_mixer\.pwconv2|mlp\.fc2|match_attention_(self|cross)\.proj")


def rescale(filters: torch.Tensor, count: int, channels: int) -> torch.Tensor:
    """Filters before a pixel shuffle, or their biases, for another scale: (channels r^2, ...) -> (count, ...)."""
    sides = [round((number / channels) ** 0.5) for number in (len(filters), count)]
    grids = filters.reshape(channels, sides[0], sides[0], -1)
    grids = F.interpolate(grids.permute(0, 3, 1, 2), size=(sides[1], sides[1]), mode="bilinear")
    return grids.permute(0, 2, 3, 1).reshape(count, *filters.shape[1:]).contiguous()


def exchange_axes(network: MatchFlow, state: dict[str, torch.Tensor]) -> None:
    """Update y from the window of the cross-attention as x is updated, in the state of a MatchFlow."""
    for name, layer in network.named_modules():
        if not isinstance(layer, MatchLayer):
            continue
        x, y = layer.split[0], layer.split[0] + 1
        cross = layer.match_attention_cross
        side = 2 * cross.radius + 2
        rows = state[f"{name}.match_attention_cross.proj.weight"]
        window = rows[x, -cross.num_heads * side**2 :].unflatten(0, (-1, side, side))
        rows[y] = 0
        rows[y, -window.numel() :] = window.transpose(1, 2).flatten()
        state[f"{name}.match_attention_self.proj.weight"][y] = 0
        state[f"{name}.field_scale"][..., 1] = state[f"{name}.field_scale"][..., 0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("new", type=Path)
    parser.add_argument("--source", help="name of the model in FILE, if it is another one")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    trained = visionattn.load(args.file, args.source or args.name).state_dict()
    network = timm.create_model(args.name)
    fresh_state = network.state_dict()
    state = dict(fresh_state)
    for key, fresh in fresh_state.items():
        if key in trained and key.startswith("upsampler"):
            state[key] = rescale(trained[key], len(fresh), network.out_chans)
        elif key in trained:
            state[key] = trained[key]
        elif LAST.search(key):
            state[key] = torch.zeros_like(fresh)
    wrong = [key for key, fresh in fresh_state.items() if state[key].shape != fresh.shape]
    if wrong:
        raise SystemExit(
            f"{args.file} does not fit {args.name}: {len(wrong)} tensors differ in shape, such as {wrong[0]}."
        )
    if isinstance(network, MatchFlow) and "flow" not in trained:
        exchange_axes(network, state)
    with atomic_path(args.new) as temporary:
        save_file(state, temporary)
    new, gone = (len(one.keys() - other.keys()) for one, other in ((state, trained), (trained, state)))
    print(f"{args.new}: {new} new tensors, {gone} left out")


if __name__ == "__main__":
    main()
