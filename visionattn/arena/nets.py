"""Mixers as layers of small networks: their settings, and the training shared by all tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.mixers import Mixer, find_mixer

__all__ = ["CONTROLS", "SMALL", "create_mixer", "train"]

CONTROLS = ("softmax", "identity", "mean", "random_qk")
"""Mixers in every run: softmax attention, no mixing, mean pooling, a random map that does not depend on the input."""

SMALL: dict[str, dict[str, Any]] = {
    "window": {"kernel": 5},
    "hsa": {"windows": 4},
    "agent": {"num_agents": 16},
    "halo": {"block_size": 4, "halo_size": 1},
}
"""Settings for training on grids of 8 x 8 cells; the defaults are for grids of 14 x 14 and larger."""

LR = 1e-2


def create_mixer(
    name: str, dim: int, num_heads: int, grid: tuple[int, int], small: bool = True, **kwargs: Any
) -> Mixer:
    """Create a mixer for a grid.

    Args:
        name: Name in `MIXERS`.
        dim: Number of channels.
        num_heads: Number of heads.
        grid: (H, W), for mixers whose parameters depend on the size of the grid.
        small: Use the settings of `SMALL`.
        **kwargs: Further arguments of the mixer.

    Raises:
        UnknownNameError: No mixer has this name.
    """
    kind = find_mixer(name)
    settings = dict(SMALL.get(name, {})) if small else {}
    if "grid_size" in inspect.signature(kind).parameters:
        settings["grid_size"] = grid
    return kind(dim, num_heads, **settings, **kwargs)


def train(net: nn.Module, loss_of_batch: Callable[[int], Tensor], steps: int) -> None:
    """Train with AdamW, warm-up over a tenth of the steps, cosine decay and gradients clipped at norm 1.

    All mixers have the same learning rate, which was not tuned for any of them.

    Args:
        net: Network to train in place; it is in evaluation mode at the end.
        loss_of_batch: Returns the loss for the index of a step.
        steps: Number of training steps; 0: no training.
    """
    net.train()
    if steps > 0:
        optimiser = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=steps + 1, pct_start=0.1)
        for step in range(steps):
            optimiser.zero_grad()
            loss_of_batch(step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    net.eval()
