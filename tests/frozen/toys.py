"""A small vision transformer whose attention is not uniform, and golden numbers where they are at hand."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn


def golden(name: str) -> Any:
    """Arrays that the authors' code computed, from a folder that the environment names."""
    path = Path(os.environ.get("VISIONATTN_GOLDEN", "")) / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"VISIONATTN_GOLDEN names no folder with {path.name}")
    return np.load(path)


def vit(grid: tuple[int, int] = (6, 6), depth: int = 3, sharp: float = 6.0, **kwargs) -> nn.Module:
    """Patches of 4 x 4 pixels; queries `sharp` times as large as drawn."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(4 * grid[0], 4 * grid[1]),
        patch_size=4,
        depth=depth,
        embed_dim=16,
        num_heads=2,
        num_classes=5,
        **kwargs,
    ).eval()
    nn.init.normal_(model.head.weight)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.25)
        with torch.no_grad():
            block.attn.qkv.weight[:16] *= sharp
    return model


def images(count: int = 2, grid: tuple[int, int] = (6, 6)) -> torch.Tensor:
    return torch.randn(count, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(1))
