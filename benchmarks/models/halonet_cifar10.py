"""Train the small HaloNet and its controls on CIFAR-10 with one recipe; one CSV row a run.

    python -m benchmarks.models.halonet_cifar10 --root FOLDER_OF_SHEETS --epochs 100 --seeds 0 1 2 --device cuda

Rows that are already in the CSV file are not run again. The recipe is that of `small_images.py`.

Groups of runs:
    halo      `va_halonet_nano_32`, and the same with a halo of 1 pixel
    control   no halo, so that windows never see each other: what the halo brings
    peer      networks of other kinds with about as many parameters and multiply-accumulates, from timm's own parts: a
              ResNet of basic blocks (ByobNet, SiLU), a Swin Transformer of windows of 4 x 4
"""

import timm
from timm.models import ByobNet, ByoModelCfg
from timm.models.byobnet import ByoBlockCfg
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from benchmarks.models.small_images import run_grid

RUNS = {
    "halo": ("halo", {}),
    "no_halo": ("control", {"halo_size": 0}),
    "resnet": ("peer", {"widths": (16, 32, 56), "depths": (2, 2, 1)}),
    "swin": ("peer", {"embed_dim": 16, "depths": (4, 2, 1), "num_heads": (1, 2, 4), "mlp_ratio": 3}),
    "halo_1": ("halo", {"halo_size": 1}),
}


def resnet(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Module:
    """Basic blocks behind a 3 x 3 stem; stages after the first start at stride 2."""
    blocks = tuple(ByoBlockCfg("basic", d, width, s=1 if width == widths[0] else 2) for d, width in zip(depths, widths))
    config = ByoModelCfg(blocks, stem_chs=widths[0], stem_pool="", act_layer="silu")
    network = ByobNet(config, num_classes=10)
    network.stem.conv.stride = (1, 1)  # timm's stems all have a stride
    return network


def build(data: str, run: str) -> nn.Module:
    """The network of a run."""
    settings = RUNS[run][1]
    if run == "resnet":
        return resnet(**settings)
    if run == "swin":
        return SwinTransformer(img_size=32, patch_size=1, num_classes=10, window_size=4, **settings)
    return timm.create_model("va_halonet_nano_32", **settings)


if __name__ == "__main__":
    run_grid(__doc__, RUNS, build, data=("cifar10",), output="halonet_cifar10.csv")
