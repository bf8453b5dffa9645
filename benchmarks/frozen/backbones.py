"""Backbones for the measurements on frozen models: the shipped one, two that are trained here, and a sharpened one.

    micro        va_minimal_vit_micro_patch4_32 as shipped: a masked autoencoder
    sharp        the same with logits times 4 in all layers
    supervised   timm's ViT, patch 4, class token: trained on CIFAR-10's classes
    rotary       timm's EVA with rotary positions, register tokens and mean pooling, likewise

The two are trained for some minutes, once, and kept in a folder. All take any image size.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.models.cifar_sheets import load_cifar10_sheets

BACKBONES = ("micro", "sharp", "supervised", "rotary")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SHARP = 4.0
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 10}


def build(name: str) -> nn.Module:
    """An untrained backbone, or one that is shipped."""
    if name in ("micro", "sharp"):
        model = timm.create_model("va_minimal_vit_micro_patch4_32", pretrained=True, num_classes=0)
        if name == "sharp":
            sharpen(model)
        return model.eval()
    torch.manual_seed(0)
    if name == "supervised":
        return VisionTransformer(**SIZES, dynamic_img_size=True)
    return Eva(
        **SIZES,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        num_reg_tokens=4,
        global_pool="avg",
        ref_feat_shape=(8, 8),
        dynamic_img_size=True,
    )


def sharpen(model: nn.Module) -> None:
    """Multiply the queries of every layer."""
    for block in model.blocks:  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                parameter[: model.embed_dim] *= SHARP


def backbone(name: str, cifar: Path | None, runs: Path, minutes: float) -> nn.Module:
    """A frozen backbone, trained first if it is not in the folder `runs`."""
    model = build(name)
    if name in ("supervised", "rotary"):
        path = runs / f"{name}.pt"
        if not path.exists():
            if cifar is None:
                raise SystemExit(f"{path} is not there: --cifar is required to train it.")
            train(model, cifar, minutes)
            runs.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


def train(model: nn.Module, cifar: Path, minutes: float, batch: int = 128) -> None:
    """Train on CIFAR-10's classes for minutes of processor time, and print the accuracy on held-out images."""
    pixels, labels = load_cifar10_sheets(cifar, "train")
    images, classes = prepare(pixels), torch.from_numpy(labels).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    generator, start, used = torch.Generator().manual_seed(0), time.process_time(), 0.0
    model.train()
    while used < 1:
        used = (time.process_time() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, used / 0.05) * max(0.0, 1 - used)
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows]
        x = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
        loss = F.cross_entropy(model(x), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels, labels = load_cifar10_sheets(cifar, "val")
    with torch.no_grad():
        right = model.eval()(prepare(pixels)).argmax(1) == torch.from_numpy(labels)
    print(f"trained for {minutes:g} minutes: {right.float().mean():.3f} of {len(labels)} held-out images", flush=True)


def prepare(pixels: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) -> normalized float32 (n, 3, H, W)."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
