"""SPAN's block and its convolution in branches: the contract, fusing, the equations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import SPAB, Conv3XC
from visionattn.errors import InputError


class TestConv3XC(BlockContract):
    block = Conv3XC
    cases = [
        {"in_chans": 4, "out_chans": 4},
        {"in_chans": 4, "out_chans": 6, "branches": True},
        {"in_chans": 4, "out_chans": 3, "gain": 3, "branches": True},
    ]
    open_axes = (0, 2, 3)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, 4, size, size + 2)

    def output_shape(self, case, x):
        return len(x), case["out_chans"], *x.shape[2:]


class Both(nn.Module):
    """Both outputs of a block side by side."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.block(x), dim=1)


class TestSPAB(BlockContract):
    block = SPAB
    cases = [{"dim": 4}, {"dim": 4, "branches": True}]
    open_axes = (0, 2, 3)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, 4, size, size + 2)

    def output_shape(self, case, x):
        return len(x), 2 * case["dim"], *x.shape[2:]

    def make(self, case, **kwargs):
        return Both(super().make(case, **kwargs))


def test_block_is_its_equations():
    block = randomise(SPAB(3, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    s1 = block.conv1(x) * block.conv1(x).sigmoid()
    s2 = block.conv2(s1) * block.conv2(s1).sigmoid()
    h = block.conv3(s2)
    out, first = block(x)
    torch.testing.assert_close(out, (h + x) * torch.tanh(h / 2) / 2)
    torch.testing.assert_close(first, s1)


def test_training_computes_the_same():
    block, x = randomise(SPAB(3)), torch.randn(1, 3, 4, 4)
    for trained, evaluated in zip(block.train()(x), block.eval()(x), strict=True):
        assert torch.equal(trained, evaluated)


@pytest.mark.parametrize(("in_chans", "out_chans", "gain"), [(3, 5, 2), (4, 4, 2), (2, 3, 1), (1, 2, 4)])
def test_fused_equals_branches_at_borders_too(in_chans, out_chans, gain):
    conv = randomise(Conv3XC(in_chans, out_chans, gain, branches=True, dtype=torch.float64))
    x = torch.randn(2, in_chans, 6, 5, dtype=torch.float64)
    expected = conv(x)
    conv.fuse()
    assert [name for name, _ in conv.named_parameters()] == ["conv.weight", "conv.bias"]
    error = (conv(x) - expected).abs() / expected.abs().max()
    assert error[..., 1:-1, 1:-1].max() < 1e-14
    assert error.max() < 1e-14  # the border among them
    before = conv.conv.weight.clone()
    conv.fuse()
    assert torch.equal(conv.conv.weight, before)


def test_fusing_is_done_in_float64():
    conv = randomise(Conv3XC(8, 8, branches=True, dtype=torch.bfloat16))
    exact = Conv3XC(8, 8, branches=True, dtype=torch.float64)
    exact.load_state_dict(conv.state_dict())
    conv.fuse()
    exact.fuse()
    assert conv.conv.weight.dtype == torch.bfloat16
    assert torch.equal(conv.conv.weight, exact.conv.weight.bfloat16())


@pytest.mark.parametrize(("in_chans", "out_chans", "gain"), [(3, 5, 2), (4, 4, 3)])
def test_branches_of_a_fused_convolution_are_exact_and_can_learn(in_chans, out_chans, gain):
    conv = randomise(Conv3XC(in_chans, out_chans, gain, dtype=torch.float64))
    weight, bias = conv.conv.weight.clone(), conv.conv.bias.clone()
    x = torch.randn(2, in_chans, 6, 5, dtype=torch.float64)
    expected = conv(x)
    conv.unfuse()
    assert conv.conv is None
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-13)
    conv(x).square().sum().backward()
    assert [name for name, p in conv.named_parameters() if p.grad is None or not p.grad.any()] == []
    conv.fuse()
    assert torch.equal(conv.conv.weight, weight)
    assert torch.equal(conv.conv.bias, bias)


def test_forms_keep_mode_and_frozen_weights():
    conv = Conv3XC(2, 3).eval().requires_grad_(False)
    conv.unfuse()
    assert not conv.mix.training
    assert not any(p.requires_grad for p in conv.parameters())
    conv.fuse()
    assert not conv.conv.training
    assert not conv.conv.weight.requires_grad


def test_branches_give_the_gradient_of_the_fused_convolution():
    branches = randomise(Conv3XC(3, 4, branches=True, dtype=torch.float64))
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(branches(x).square().sum(), x)
    branches.fuse()
    (found,) = torch.autograd.grad(branches(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_padding_after_the_first_convolution_would_not_fuse():
    """What the place of the padding is for: the ring around the image carries the first bias."""
    conv = randomise(Conv3XC(2, 2, branches=True, dtype=torch.float64))
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    late = F.pad(F.conv2d(x, conv.expand.weight, conv.expand.bias), (1, 1, 1, 1))
    late = conv.project(conv.mix(late)) + conv.skip(x)
    assert (late - conv(x))[..., 1:-1, 1:-1].abs().max() < 1e-14
    assert (late - conv(x)).abs().max() > 1e-2


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match="at least 1; got 0, 3 and 2"):
        Conv3XC(0, 3)
