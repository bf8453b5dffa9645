"""Small networks whose results are known."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn


class Repeat(nn.Module):
    """Repeats each pixel r x r times: what comes out is known to the last bit."""

    task = "restore"
    radius = 0

    def __init__(self, scale=2, in_chans=3):
        super().__init__()
        self.scale, self.in_chans = scale, in_chans
        self.spread = nn.Conv2d(in_chans, in_chans * scale**2, 1, bias=False)
        weight = torch.eye(in_chans).repeat_interleave(scale**2, dim=0)
        self.spread.weight.data = weight[:, :, None, None]
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x):
        return self.shuffle(self.spread(x))


class Blur(nn.Module):
    """Convolutions of small integers: its float64 sums of dyadic numbers are exact in whatever order they are taken."""

    task = "restore"

    def __init__(self, scale=2, in_chans=3, layers=3):
        super().__init__()
        self.scale, self.in_chans, self.radius = scale, in_chans, layers
        width = 6
        sizes = [in_chans, *[width] * (layers - 1), in_chans * scale**2]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            layer.weight.data = torch.randint(-2, 3, layer.weight.shape, generator=generator) / 64
            layer.bias.data = torch.randint(0, 3, layer.bias.shape, generator=generator) / 16
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.shuffle(self.layers[-1](x))


def picture(height=20, width=30, channels=3, dtype=np.uint8, seed=0):
    """Smooth random pixels."""
    low = np.random.default_rng(seed).random((height // 4 + 2, width // 4 + 2, channels))
    pixels = low.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    if np.dtype(dtype).kind == "f":
        return pixels.astype(dtype)
    return np.rint(pixels * np.iinfo(dtype).max).astype(dtype)


def repeated(pixels, scale=2):
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
