"""Convert a head of `visionattn probe` to the weight file of the shipped network with that read-out.

    python -m tools.ship_read_out heads/ep_32-layer7.safetensors

The head is efficient probing with 32 queries of `va_minimal_vit_micro_patch4_32`. Its batch norm is folded into the
classifier.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import visionattn  # noqa: F401  registers the models
from visionattn.files import atomic_path
from visionattn.probe import load_head
from visionattn.probe.heads.banks import Head
from visionattn.weights import SHIPPED

BACKBONE, NAME = "va_minimal_vit_micro_patch4_32", "va_minimal_vit_micro_patch4_32_ep"


def read_out(head: Head) -> dict[str, torch.Tensor]:
    """Weights of the read-out, by their names in the network, without a batch norm."""
    state, norm = head.state_dict(), head.norm
    inv_std = (norm.running_var + norm.eps).rsqrt()
    weight = state["classifier.weight"] * inv_std
    return {
        "attn_pool.queries": state["pooling.queries"],
        "attn_pool.value.weight": state["pooling.value.weight"],
        "head.weight": weight,
        "head.bias": state["classifier.bias"] - weight @ norm.running_mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    head = load_head(parser.parse_args().head)
    file = SHIPPED / f"{NAME}.safetensors"
    with atomic_path(file) as temporary:
        save_file({key: value.contiguous() for key, value in read_out(head).items()}, temporary)
    backbone, network = (timm.create_model(name, pretrained=True).eval() for name in (BACKBONE, NAME))
    images = torch.rand(4, 3, 32, 32)
    expected = head(backbone.forward_features(images)[:, 1:])
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
