"""The encoder of MatchStereo and MatchFlow: the contract; `tests/models/test_match_stereo.py` has its equations."""

import torch
from torch import nn

from tests.blocks.contract import BlockContract
from visionattn.blocks import MatchEncoder, MatchFusion


class SmallestMap(nn.Module):
    """The map that depends on all parameters."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)[-1]


class TestMatchEncoder(BlockContract):
    block = MatchEncoder
    cases = [{"widths": (4, 6), "depths": (1, 2)}]
    open_axes = (0, 2, 3)

    @staticmethod
    def inputs(batch, size):
        return torch.rand(batch, 3, 8 * size + 16, 8 * size + 24)

    def make(self, case, **kwargs):
        return SmallestMap(super().make(case, **kwargs)).eval()

    def output_shape(self, case, x):
        return len(x), x.shape[2] // 8, x.shape[3] // 8, case["widths"][-1]


class FusionParts(nn.Module):
    """A fusion of two maps that lie in the channels of the smaller one."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = nn.functional.pixel_shuffle(x[..., 5:].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return self.fusion(skip, x[..., :5])


class TestMatchFusion(BlockContract):
    block = MatchFusion
    cases = [{"dim_low": 5, "dim": 4}]
    open_axes = (0, 1, 2)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, size + 2, 5 + 4 * 4)

    def make(self, case, **kwargs):
        return FusionParts(super().make(case, **kwargs)).eval()

    def output_shape(self, case, x):
        return len(x), 2 * x.shape[1], 2 * x.shape[2], case["dim"]


def test_maps_have_their_sizes():
    maps = MatchEncoder((4, 6, 8, 10), (1, 1, 1, 1))(torch.rand(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 24, 4), (2, 8, 12, 6), (2, 4, 6, 8), (2, 2, 3, 10)]
