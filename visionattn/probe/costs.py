"""Costs of running a backbone: parameters, multiply-accumulates, size, and time measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionattn.probe.tokens.backbone import Backbone

__all__ = ["BackboneCost", "Timing", "backbone_cost", "time_backbones"]

ROUNDS, SECONDS = (7, 50), 2.0
"""Minimum and maximum number of timing rounds, and the seconds per backbone after which no new round starts."""


class BackboneCost(NamedTuple):
    """Size of a backbone.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image: matrix products, convolutions and attention.
        bytes: Size of its weights in memory, in bytes.
    """

    parameters: int
    macs: int
    bytes: int


class Timing(NamedTuple):
    """Milliseconds for a single image: median and quartiles of several runs, and the number of runs."""

    median: float
    low: float
    high: float
    rounds: int


def backbone_cost(backbone: Backbone) -> BackboneCost:
    """Count the costs of a backbone with one black image."""
    model = backbone.model
    # PyTorch 2.11 does not count the products of its fused attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(_image(backbone))
    return BackboneCost(
        sum(parameter.numel() for parameter in model.parameters()),
        counter.get_total_flops() // 2,
        sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


def time_backbones(backbones: Sequence[Backbone]) -> list[Timing]:
    """Time backbones in turns, one image each, so that other load on the machine affects all of them alike.

    Args:
        backbones: Backbones on the device to be timed.
    """
    images = [_image(backbone) for backbone in backbones]
    found: list[list[float]] = [[] for _ in backbones]
    fewest, most = ROUNDS
    for backbone, image in zip(backbones, images):  # warm-up: memory allocation and choice of algorithms
        _milliseconds(backbone, image)
    start = time.perf_counter()
    for number in range(most):
        if number >= fewest and time.perf_counter() - start > SECONDS * len(backbones):
            break
        order = range(len(backbones)) if number % 2 else reversed(range(len(backbones)))
        for place in order:
            found[place].append(_milliseconds(backbones[place], images[place]))
    return [_timing(times) for times in found]


def _timing(times: Sequence[float]) -> Timing:
    low, median, high = map(float, np.quantile(times, (0.25, 0.5, 0.75)))
    return Timing(median, low, high, len(times))


def _image(backbone: Backbone) -> torch.Tensor:
    return torch.zeros(1, backbone.channels, *backbone.image_size, device=backbone.device)


def _milliseconds(backbone: Backbone, image: torch.Tensor) -> float:
    """Milliseconds for one image, synchronised with the GPU."""
    _synchronize(backbone.device)
    start = time.perf_counter()
    backbone(image)
    _synchronize(backbone.device)
    return 1000 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
