"""Matching networks whose results are known: they read them from the colours."""

import numpy as np
import torch
from torch import nn

GAIN = 20.0


class Stereo(nn.Module):
    """The disparity of a view is 20 times its red."""

    task = "stereo"
    size_minimum = 4

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(GAIN))

    def forward(self, left, right, start=None):
        found = self.gain * torch.cat([left[:, :1], right[:, :1]], 1)
        return found if start is None else found + start

    def low_resolution_start(self, left, right):
        return 3.0


class Flow(Stereo):
    """The flow of an image is 20 times its red and green."""

    task = "flow"

    def forward(self, left, right, start=None):
        return self.gain * torch.cat([left[:, :2], right[:, :2]], 1)


def view(height, width, value, channels=3, dtype=np.uint8):
    """A view of one colour, which is `value` of 0..1."""
    return np.full((height, width, channels), round(value * np.iinfo(dtype).max), dtype)


def shifted(height, width, shift, seed=0):
    """A left and a right view of a textured plane of that disparity."""
    low = np.random.default_rng(seed).random((height // 4 + 1, (width + shift) // 4 + 1, 3))
    wide = (255 * low.repeat(4, 0).repeat(4, 1)[:height, : width + shift]).astype(np.uint8)
    return wide[:, :width], wide[:, shift:]
