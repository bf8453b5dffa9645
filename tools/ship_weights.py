"""Convert a checkpoint of `visionattn fit` to the weight file that the package ships for a model name.

    python -m tools.ship_weights CHECKPOINT va_span_ch26_x4
    python -m tools.ship_weights CHECKPOINT va_span_ch26_x4.real
    python -m tools.ship_weights CHECKPOINT va_match_stereo_nano --half

The input range of SPAN's training is folded exactly into the first convolution, so that the network equals the one that
`timm.create_model` builds for the name. `--half` stores parameters in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.files import atomic_path
from visionattn.weights import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    parser.add_argument("--half", action="store_true")
    args = parser.parse_args()
    trained = visionattn.load(args.checkpoint).eval()
    if args.half:  # running statistics can exceed float16's range
        for parameter in trained.parameters():
            parameter.data = parameter.data.half().float()
    settings = {"attributes": trained.attributes, "embed_dim": trained.embed_dim} if trained.task == "retrieve" else {}
    shipped = timm.create_model(args.name, **settings).eval()
    state = {key: value for key, value in trained.state_dict().items() if key in shipped.state_dict()}
    if hasattr(trained, "norm") and hasattr(trained.norm, "factor"):
        state["conv_1.conv.weight"] = state["conv_1.conv.weight"] * (trained.norm.factor / shipped.norm.factor)
    if args.half:
        parameters = dict(shipped.named_parameters())
        state = {key: value.half() if key in parameters else value for key, value in state.items()}
    state = {key: value.contiguous() for key, value in state.items()}
    shipped.load_state_dict(state)
    images = torch.rand(2 if shipped.task in ("stereo", "flow") else 1, 2, *shipped.pretrained_cfg["input_size"])
    torch.testing.assert_close(shipped(*images), trained(*images), rtol=1e-4, atol=1e-4)
    file = SHIPPED / f"{args.name}.safetensors"
    with atomic_path(file) as temporary:
        save_file(state, temporary)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
