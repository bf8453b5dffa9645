"""Turn a checkpoint of `visionattn fit` into the file that the package ships for a name.

    python benchmarks/span_weights.py CHECKPOINT va_span_ch26_x4

The input range that training used is folded into the first convolution, exactly, so that the network is the one that
`timm.create_model` builds by that name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import visionattn
from visionattn import weights
from visionattn.files import atomic_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    args = parser.parse_args()
    trained = visionattn.load(args.checkpoint)
    shipped = timm.create_model(args.name).eval()
    state = {key: value for key, value in trained.state_dict().items() if key in shipped.state_dict()}
    state["conv_1.conv.weight"] = state["conv_1.conv.weight"] * (trained.norm.factor / shipped.norm.factor)
    shipped.load_state_dict(state)
    image = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(shipped(image), trained(image), rtol=1e-4, atol=1e-4)
    file = Path(weights.__file__).parent / f"{args.name}.safetensors"
    with atomic_path(file) as temporary:
        save_file({key: value.contiguous() for key, value in shipped.state_dict().items()}, temporary)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
