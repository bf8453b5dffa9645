"""Transfer the weights of a MatchStereo to one with other depths, for further training.

    python -m tools.carry_weights FILE va_match_stereo_nano NEW.safetensors

At each scale, blocks and layers that exist in both keep their weights, surplus ones are left out, and new ones start as
the identity: the weights of their last linear layers are 0.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.files import atomic_path

# The last linear layer of each residual branch, in the blocks of the encoder and the layers of the decoder.
LAST = re.compile(r"token_mixer\.pwconv2|mlp\.fc2|match_attention_(self|cross)\.proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    trained = visionattn.load(args.file, args.name).state_dict()
    state = timm.create_model(args.name).state_dict()
    for key, fresh in state.items():
        if key in trained:
            state[key] = trained[key]
        elif LAST.search(key):
            state[key] = torch.zeros_like(fresh)
    with atomic_path(args.new) as temporary:
        save_file(state, temporary)
    new, gone = (len(one.keys() - other.keys()) for one, other in ((state, trained), (trained, state)))
    print(f"{args.new}: {new} new tensors, {gone} left out")


if __name__ == "__main__":
    main()
