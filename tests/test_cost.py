"""Multiply-accumulates and parameters."""

import torch
from torch import nn

from visionattn.cost import count_macs, count_parameters


def test_counts_are_those_of_the_arithmetic():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert count_parameters(model) == 3 * 8 * 9 + 8 * 16 * 5 + 5
    assert count_macs(model, (3, 4, 4)) == 3 * 8 * 9 * 16 + 8 * 16 * 5


def test_the_model_stays_as_it_was():
    model = nn.Linear(2, 2)
    count_macs(model, (2,))
    assert model.training
    assert model.weight.device.type == "cpu"
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_parameters_are_not_counted():
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 16
    assert torch.is_tensor(model.bias)
