"""HaloNet: the paper's parameters, timm's network with the same weights, any size, hybrids, dense use."""

import copy

import pytest
import timm
import torch
from timm.models import ByobNet, ByoModelCfg
from timm.models.byobnet import ByoBlockCfg
from torch.optim.swa_utils import update_bn

from visionattn.blocks import HaloAttention
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError
from visionattn.models.halonet import VARIANTS

NANO = "va_halonet_nano_32"
# Closed form over the paper's table; rounded to a tenth of a million it is what the paper prints.
PARAMETERS = {
    "h0": (5_502_248, 2.31),
    "h1": (8_101_352, 2.94),
    "h2": (9_405_608, 3.26),
    "h3": (11_842_792, 6.08),
    "h4": (19_103_464, 11.86),
    "h5": (30_718_952, 31.96),
    "h6": (43_458_280, 52.45),
    "h7": (67_434_728, 110.16),
}


def closed_form(block, halo, r_v, r_b, l3, d_f):
    """Parameters from the table's row alone."""
    table = 2 * (2 * (block + 2 * halo) - 1)
    total, channels = 3 * 64 * 49 + 2 * 64, 64
    for width, depth, heads in zip((64, 128, 256, 512), (3, 3, l3, 3), (4, 8, 8, 8)):
        values, out = width * r_v, width * r_b
        if (channels, width) != (out, 64):
            total += channels * out + 2 * out
        for _ in range(depth):
            total += channels * width + 2 * width
            total += 2 * width**2 + width * values + table * width // heads + 2 * values
            total += values * out + 2 * out
            channels = out
    if d_f:
        total, channels = total + channels * d_f + 2 * d_f, d_f
    return int(total + channels * 1000 + 1000)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters_and_macs(name, expected):
    model = timm.create_model(f"va_halonet_{name}", device="meta")
    row = VARIANTS[name]
    assert count_parameters(model) == expected[0]
    assert expected[0] == closed_form(
        row.get("block_size", 8),
        row.get("halo_size", 3),
        row.get("value_ratio", 1),
        row["expansion"],
        row["depths"][2],
        row.get("num_features", 0),
    )
    assert count_macs(model, model.pretrained_cfg["input_size"]) / 1e9 == pytest.approx(expected[1], abs=0.006)


def calibrated(model, *size):
    """A model whose every layer matters: no branch is zero, and batch norm has seen images."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, std=0.1)
    update_bn([torch.randn(4, *size)], model)
    return model.eval()


def timms(row):
    """The same network from timm's own blocks and its HaloAttn, whose values are as wide as queries."""
    blocks = tuple(
        ByoBlockCfg(
            "self_attn",
            d=depth,
            c=round(width * row["expansion"]),
            s=1 if width == 64 else 2,
            br=1 / row["expansion"],
            self_attn_layer="halo",
            self_attn_kwargs={"block_size": 8, "halo_size": 3, "num_heads": heads},
        )
        for width, depth, heads in zip((64, 128, 256, 512), row["depths"], (4, 8, 8, 8))
    )
    return ByobNet(ByoModelCfg(blocks, stem_chs=64, stem_type="7x7", stem_pool="maxpool", act_layer="silu"))


def blocks(model):
    return [model.stem, *(block for stage in model.stages for block in stage), model.final_conv, model.head]


@pytest.mark.parametrize("name", ["h0", "h2"])
def test_is_timms_network_of_timms_layers(name):
    # Block by block in float64, since random weights make a network that amplifies rounding.
    ours = calibrated(timm.create_model(f"va_halonet_{name}", border="zero", index="timm"), 3, 256, 256).double()
    theirs = timms(VARIANTS[name]).eval().double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    for block, reference in zip(blocks(ours), blocks(theirs), strict=True):
        expected = reference(x)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-10 * expected.std().item())
        x = expected


@pytest.mark.parametrize("size", [(1, 1), (33, 57), (40, 24)])
def test_any_size(size):
    model = calibrated(timm.create_model("va_halonet_h0", num_classes=5), 3, 64, 64)
    assert torch.isfinite(model(torch.randn(2, 3, *size))).all()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for features, info in zip(maps, model.feature_info):
        assert features.shape[1:] == (info["num_chs"], *(-(-pixels // info["reduction"]) for pixels in size))


def test_h7_takes_600_pixels():
    model = timm.create_model("va_halonet_h7", device="meta")
    maps = model.forward_intermediates(torch.empty(1, 3, 600, 600, device="meta"), intermediates_only=True)
    assert [features.shape[-1] for features in maps] == [300, 150, 75, 38, 19]


def test_dense_features_at_1024_pixels():
    backbone = timm.create_model("va_halonet_h0", features_only=True, stages=("conv", "conv", "halo", "halo")).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 1024, 1024))
    assert [features.shape[-1] for features in maps] == [1024 // r for r in backbone.feature_info.reduction()]
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_stages_choose_convolution_or_attention():
    model = timm.create_model("va_halonet_h4", stages=("conv", "conv", "halo", "halo"), device="meta")
    kinds = [{type(module).__name__ for module in stage.modules()} for stage in model.stages]
    assert ["HaloAttention" in kind for kind in kinds] == [False, False, True, True]
    with pytest.raises(InputError, match="'halo' or 'conv'; got 'mlp'"):
        timm.create_model("va_halonet_h4", stages=("conv", "mlp", "halo", "halo"))
    with pytest.raises(InputError, match="got 4, 4, 4 and 3 entries"):
        timm.create_model("va_halonet_h4", stages=("conv", "halo", "halo"))


def test_choices_reach_every_attention():
    model = timm.create_model(NANO, block_size=2, halo_size=0, border="zero", index="timm")
    layers = [module for module in model.modules() if isinstance(module, HaloAttention)]
    assert len(layers) == 4
    for layer in layers:
        assert (layer.block_size, layer.halo_size, layer.border, layer.index) == (2, 0, "zero", "timm")


def test_halo_is_what_lets_windows_see_each_other():
    """Without a halo and with 1 x 1 convolutions around it, a pixel reaches the output of its own window only."""
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    for halo, reach in ((0, slice(4, 8)), (2, slice(2, 10))):
        model = timm.create_model(NANO, stages=("halo",) * 3, halo_size=halo)
        block = calibrated(model, 3, 32, 32).stages[0][0]
        (gradient,) = torch.autograd.grad(block(x)[0, :, 5, 5].sum(), x)
        seen = gradient.abs().amax(1)[0] > 0
        expected = torch.zeros_like(seen)
        expected[reach, reach] = True
        assert torch.equal(seen, expected)


def test_channels_last_changes_nothing():
    model = calibrated(timm.create_model(NANO), 3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


def test_unknown_width_of_heads_is_refused():
    with pytest.raises(InputError, match=r"width \(64\) must be divisible by num_heads \(6\)"):
        timm.create_model("va_halonet_h0", heads=(6, 8, 8, 8))
