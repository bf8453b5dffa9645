"""Mixers as the layers of small networks: their settings there, and how all networks of the tasks are trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.mixers import Mixer, find_mixer

__all__ = ["CONTROLS", "SMALL", "create_mixer", "train"]

CONTROLS = ("softmax", "identity", "mean", "random_qk")
"""In every run: softmax attention, no mixing, mean pooling, a random map that does not depend on the input."""

SMALL: dict[str, dict[str, Any]] = {
    "window": {"kernel": 5},
    "hsa": {"windows": 4},
    "agent": {"num_agents": 16},
    "halo": {"block_size": 4, "halo_size": 1},
}
"""Settings for the grids of 8 x 8 cells that mixers are trained on; the defaults are for grids of 14 x 14 and more."""

LR = 1e-2


def create_mixer(
    name: str, dim: int, num_heads: int, grid: tuple[int, int], small: bool = True, **kwargs: Any
) -> Mixer:
    """A mixer for a grid.

    Args:
        name: In `MIXERS`.
        dim: Channels.
        num_heads: Heads.
        grid: (H, W), for mixers with parameters of a grid's size.
        small: Use the settings of `SMALL`.
        **kwargs: Further arguments of the mixer.

    Raises:
        UnknownNameError: There is no such mixer.
    """
    kind = find_mixer(name)
    settings = dict(SMALL.get(name, {})) if small else {}
    if "grid_size" in inspect.signature(kind).parameters:
        settings["grid_size"] = grid
    return kind(dim, num_heads, **settings, **kwargs)


def train(net: nn.Module, loss_of_batch: Callable[[int], Tensor], steps: int) -> None:
    """AdamW whose learning rate rises over a tenth of the steps and falls along a cosine; gradients are clipped at 1.

    All mixers have the same rate: none was chosen for one of them.

    Args:
        net: Trained in place, and set to evaluation mode at the end.
        loss_of_batch: Number of the step -> loss.
        steps: Of training; 0 trains nothing.
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
