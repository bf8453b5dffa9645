"""Train every minimal ViT and its controls with one recipe; one CSV row a run.

    python -m benchmarks.models.minimal_vit --data mnist --root FOLDER --epochs 20 --seeds 0 1 2
    python -m benchmarks.models.minimal_vit --data cifar10 --root FOLDER --epochs 100 --seeds 0 1 2 --device cuda

FOLDER holds MNIST's four idx files, or the CIFAR-10 sheets. Networks have the width and depth of the public
replication of arXiv 2410.13732 (6 blocks of width 64, MLP ratio 1, patch 7 on MNIST and 8 on CIFAR-10), so that its
numbers can be compared with ours. Rows that are already in the CSV file are not run again.

Groups of runs:
    variant      each form of `VARIANTS`; "_1head" and "_4heads" change the heads alone
    budget       attention-only networks made deeper or wider to the baseline's parameters
    readout      baseline and minimum read out by the mean or by attention instead of the class token
    replication  the replication's own architecture: post-norm, dropout 0.1, positions and T from N(0, 1)

The recipe, the same for all, is that of `small_images.py`.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import visionattn
from benchmarks.models.small_images import run_grid
from visionattn.models.minimal_vit import VARIANTS

NETWORK = {
    "mnist": {"model_name": "va_minimal_vit_nano_patch7_28", "patch_size": 7},
    "cifar10": {"model_name": "va_minimal_vit_nano_patch4_32", "patch_size": 8},
}

RUNS: dict[str, tuple[str, dict]] = {
    **{name: ("variant", {"mlp_ratio": 1, **changes}) for name, changes in VARIANTS.items()},
    "pair_1head": ("variant", {"mlp_ratio": 1, "num_heads": 1}),
    # T T^T has one head: beside it, the shared form with as many, and T T^T with as many as the shared form.
    "shared_nomlp_1head": ("variant", {**VARIANTS["shared_nomlp"], "num_heads": 1}),
    "symmetric_nomlp_4heads": ("variant", {**VARIANTS["symmetric_nomlp"], "num_heads": 4}),
    "nomlp_deeper": ("budget", {**VARIANTS["nomlp"], "depth": 9}),
    "nomlp_wider": ("budget", {**VARIANTS["nomlp"], "embed_dim": 80}),
    "minimum_deeper": ("budget", {**VARIANTS["minimum"], "depth": 35}),
    "minimum_wider": ("budget", {**VARIANTS["minimum"], "embed_dim": 152}),
    "baseline_mean": ("readout", {"mlp_ratio": 1, "global_pool": "avg"}),
    "baseline_attention": ("readout", {"mlp_ratio": 1, "global_pool": "map"}),
    "minimum_mean": ("readout", {**VARIANTS["minimum"], "global_pool": "avg"}),
    "minimum_attention": ("readout", {**VARIANTS["minimum"], "global_pool": "map"}),
    "replication_1head": ("replication", {"num_heads": 1, "mlp": True, "similarity": "pair", "values": "projected"}),
    "replication_4heads": ("replication", {"num_heads": 4, "mlp": True, "similarity": "pair", "values": "projected"}),
    "replication_symmetric": (
        "replication",
        {"num_heads": 1, "mlp": False, "similarity": "symmetric", "values": "projected"},
    ),
    "replication_minimum": (
        "replication",
        {"num_heads": 1, "mlp": False, "similarity": "collapsed", "values": "identity"},
    ),
}


class PostNormBlock(nn.Module):
    """Norm after each residual sum, dropout 0.1, hidden width of the MLP equal to that of the tokens."""

    def __init__(self, dim: int, num_heads: int, mlp: bool, similarity: str, values: str) -> None:
        super().__init__()
        self.attn = visionattn.blocks.MinimalAttention(dim, num_heads, similarity, values)
        for layer in (self.attn.qkv, self.attn.proj):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        if self.attn.triangle is not None:
            nn.init.normal_(self.attn.triangle)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) if mlp else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x)))
        return x if self.mlp is None else self.norm2(x + self.dropout(self.mlp(x)))


class Replication(nn.Module):
    """Class-token transformer with positions and class token from N(0, 1) and post-norm blocks."""

    def __init__(self, image_size: int, in_chans: int, patch_size: int, **block) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_chans, 64, patch_size, patch_size)
        self.token = nn.Parameter(torch.randn(1, 1, 64))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, 64))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[PostNormBlock(64, **block) for _ in range(6)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(self.dropout(x))[:, 0])


def build(data: str, run: str) -> nn.Module:
    """The network of a run, for the images of a data set."""
    group, settings = RUNS[run]
    if group == "replication":
        channels, size, _ = timm.get_pretrained_cfg(NETWORK[data]["model_name"]).input_size
        return Replication(size, channels, NETWORK[data]["patch_size"], **settings)
    return timm.create_model(**{**NETWORK[data], **settings})


if __name__ == "__main__":
    run_grid(__doc__, RUNS, build, data=("mnist", "cifar10"), output="minimal_vit.csv")
