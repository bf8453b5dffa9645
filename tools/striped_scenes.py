"""Conditional cross-attention trained for some seconds on generated images of a disc and a striped square."""

from __future__ import annotations

import colorsys

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.front_pictures import BACKBONE
from visionattn.blocks import ConditionalCrossAttention

SIDE, PLACES = 48, 3  # pixels; places along a side
HUES, DIRECTIONS = 8, 4


def scenes(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 48, 48) in 0..1, and the labels hue of the disc and direction of the stripes, (n, 2)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    stripes = [part // 3 % 2 for part in (y, x, x + y, x - y)]
    images, labels = [], generator.integers(0, (HUES, DIRECTIONS), (count, 2))
    step = SIDE // PLACES
    for hue, direction in labels:
        image = 200 + 3 * generator.standard_normal((SIDE, SIDE, 3))
        disc, square = (
            (y - step * (cell // PLACES) - step / 2, x - step * (cell % PLACES) - step / 2)
            for cell in generator.permutation(PLACES**2)[:2]
        )
        image[disc[0] ** 2 + disc[1] ** 2 < 49] = 255 * np.array(colorsys.hsv_to_rgb(hue / HUES, 0.8, 0.8))
        inside = np.maximum(abs(square[0]), abs(square[1])) < 7
        image[inside] = (90 + 110 * stripes[direction])[inside][:, None]
        images.append(image.clip(0, 255) / 255)
    return torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2), torch.from_numpy(labels)


def trained_maps(shown: int, training: int = 384, steps: int = 250) -> tuple[Tensor, Tensor, float]:
    """Images (n, 3, 48, 48), what each of two conditions attends to in them (n, 2, 12, 12), and the accuracy."""
    generator = np.random.default_rng(0)
    backbone = timm.create_model(BACKBONE, pretrained=True, img_size=SIDE).eval()
    mean, std = (torch.tensor(backbone.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    images, labels = scenes(training + 64, generator)
    with torch.inference_mode():
        tokens = torch.cat([backbone.forward_features((part - mean) / std) for part in images.split(64)])
    tokens = tokens.clone()[:, 1:]
    head = ConditionalCrossAttention(tokens.shape[2], num_conditions=2, embed_dim=16, num_heads=1)
    classes = torch.nn.Parameter(torch.randn(2, HUES, 16))
    optimiser = torch.optim.AdamW([*head.parameters(), classes], lr=2e-3)

    def logits(x: Tensor) -> Tensor:
        return 10 * torch.einsum("bce,cke->bck", head(x), F.normalize(classes, dim=-1))

    for _ in range(steps):
        index = torch.randint(training, (64,))
        loss = F.cross_entropy(logits(tokens[index]).flatten(0, 1), labels[index].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    with torch.inference_mode():
        right = (logits(tokens[training:]).argmax(-1) == labels[training:]).float().mean()
        maps = head.explain(tokens[training : training + shown])
    side = round(maps.shape[-1] ** 0.5)
    return images[training : training + shown], maps.unflatten(-1, (side, side)), float(right)
