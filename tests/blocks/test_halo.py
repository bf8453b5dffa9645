"""Halo attention as a block: the contract, timm's layer with the same weights, what its choices mean."""

import math

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import HaloAttention
from visionattn.cost import count_macs
from visionattn.errors import InputError


class TestHaloAttention(BlockContract):
    block = HaloAttention
    cases = [
        {"dim": 8, "num_heads": 2, "block_size": 4, "halo_size": 1},
        {"dim": 8, "dim_out": 12, "num_heads": 2, "dim_head": 3, "block_size": 2, "halo_size": 3, "qkv_bias": True},
        {"dim": 8, "num_heads": 2, "block_size": 4, "halo_size": 1, "stride": 2, "border": "zero", "index": "timm"},
        {"dim": 8, "num_heads": 4, "block_size": 4, "halo_size": 0, "scale_pos_embed": True},
    ]
    open_axes = (0, 2, 3)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, 8, size, size + 2)

    def output_shape(self, case, x):
        stride = case.get("stride", 1)
        return len(x), case.get("dim_out", 8), *(math.ceil(pixels / stride) for pixels in x.shape[2:])


def gradients(layer, x, cotangent):
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)


FORMS = [
    {},
    {"stride": 2},
    {"stride": 2, "avg_down": True},
    {"block_size": 7, "halo_size": 2},
    {"block_size": 7, "halo_size": 2, "stride": 2},
    {"block_size": 10},
    {"block_size": 10, "stride": 2},
    {"qkv_bias": True},
    {"dim_head": 3},
    {"dim_out": 8, "dim_head": 12},
    {"scale_pos_embed": True},
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_timm(form, dtype, tolerance):
    theirs = randomise(HaloAttn(16, num_heads=4, **form, dtype=dtype))
    ours = HaloAttention(16, num_heads=4, border="zero", index="timm", **form, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 2 * ours.block_size, ours.block_size, dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(theirs(x))
    for found, expected in zip(gradients(ours, x, cotangent), gradients(theirs, x, cotangent), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def test_indices_agree_without_a_stride():
    ours = randomise(HaloAttention(16, num_heads=4, block_size=4, halo_size=1))
    other = HaloAttention(16, num_heads=4, block_size=4, halo_size=1, index="timm")
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 16, 12, 12)
    assert torch.equal(ours(x), other(x))


def test_strided_queries_are_those_of_the_whole_map():
    """With true offsets, subsampling asks fewer questions and changes no answer."""
    whole = randomise(HaloAttention(16, num_heads=4, block_size=4, halo_size=1))
    strided = HaloAttention(16, num_heads=4, block_size=4, halo_size=1, stride=2)
    strided.load_state_dict(whole.state_dict())
    x = torch.randn(2, 16, 11, 6)
    torch.testing.assert_close(strided(x), whole(x)[..., ::2, ::2])


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_ragged_maps_are_padded_at_the_right_and_bottom(border):
    """Zeros appended to keys and values are what a zero border takes for granted, and a masked one never sees."""
    layer = randomise(HaloAttention(8, num_heads=2, block_size=4, halo_size=1, border=border))
    x = torch.randn(1, 8, 6, 9)
    padded = layer(F.pad(x, (0, 3, 0, 2)))[..., :6, :9]
    if border == "zero":  # without biases, a pixel of zeros has a key and a value of zeros
        torch.testing.assert_close(layer(x), padded)
    else:
        assert (layer(x) - padded)[..., -1, :].abs().max() > 1e-3


def test_channels_last_in_is_channels_last_out():
    layer = randomise(HaloAttention(16, num_heads=4, block_size=4, halo_size=1))
    x = torch.randn(2, 16, 8, 8)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=str)
def test_half_precision_and_autocast(dtype, tolerance):
    layer = randomise(HaloAttention(16, num_heads=4, block_size=4, halo_size=1))
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=tolerance)
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half, y, rtol=0, atol=tolerance)


def test_macs_are_those_of_the_arithmetic():
    layer = HaloAttention(16, num_heads=4, dim_head=2, block_size=4, halo_size=1)
    pixels, window = 12 * 8, 6
    projections = pixels * 16 * (8 + 8 + 16)
    products = pixels * (8 * window**2 + 16 * window**2 + 2 * 8 * window)
    assert count_macs(layer, (16, 12, 8)) == projections + products


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, r"dim_out \(8\) must be divisible by num_heads \(3\)"),
        ({"halo_size": -1}, "got 8, 1 and -1"),
        ({"block_size": 0}, "got 0, 1 and 3"),
        ({"border": "shift"}, "'mask', 'zero'"),
        ({"index": "paper"}, "'offset', 'timm'"),
    ],
)
def test_refusals_name_the_numbers(arguments, message):
    with pytest.raises(InputError, match=message):
        HaloAttention(8, **{"num_heads": 2, **arguments})


def test_mixed_dtypes_are_refused_outside_autocast():
    layer = HaloAttention(8, num_heads=2)
    layer.pos_embed.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"height_rel: torch\.bfloat16"):
        layer(torch.randn(1, 8, 8, 8))
