"""Minimal vision transformers: the table of variants, timm's weights, any image size, read-outs."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn
from tests.models.contract import build
from visionattn.cost import count_macs, count_parameters
from visionattn.models.minimal_vit import resize_positions

PARAMETERS = {
    "": 5_717_416,
    "_shared": 5_272_744,
    "_collapsed": 5_272_744,
    "_novalue": 4_828_072,
    "_shaped": 4_828_180,
    "_collapsed_novalue": 4_383_400,
    "_nomlp": 2_162_344,
    "_shared_nomlp": 1_717_672,
    "_symmetric_nomlp": 1_495_336,
    "_novalue_nomlp": 1_273_000,
    "_minimum": 828_328,
    "_symmetric_minimum": 605_992,
}
TINY = "va_minimal_vit_tiny_patch16_224"
NANO = "va_minimal_vit_nano_patch4_32"


@pytest.mark.parametrize(("suffix", "parameters"), PARAMETERS.items())
def test_parameters(suffix, parameters):
    assert count_parameters(timm.create_model(TINY + suffix, device="meta")) == parameters


def test_every_tiny_name_is_in_the_table():
    assert set(timm.list_models(f"{TINY}*")) == {TINY + suffix for suffix in PARAMETERS}


def test_macs_are_those_of_the_arithmetic():
    tokens, width = 197, 192
    mixing = 2 * tokens * tokens * width
    stem, head = 196 * 16 * 16 * 3 * width, 1000 * width
    # Positions are resampled by two products, 14 x 14 by 14 x (14 x 192), even where they stay as they are.
    positions = 2 * 14 * 14 * 14 * width
    rest = stem + head + positions
    for suffix, products in {"": 12, "_shared": 11, "_nomlp": 4, "_minimum": 1}.items():
        model = timm.create_model(TINY + suffix, device="meta")
        assert count_macs(model, (3, 224, 224)) == 12 * (products * tokens * width**2 + mixing) + rest


def test_baseline_is_timms_vit_tiny_to_the_bit():
    ours, x = build(TINY)
    timms = timm.create_model("vit_tiny_patch16_224").eval()
    timms.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x[:1]), timms(x[:1]))


@pytest.mark.parametrize("size", [(96, 160), (320, 224)])
def test_other_sizes_resample_positions_as_timm_does(size):
    ours, _ = build(TINY)
    timms = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new", [(5, 9), (14, 7), (3, 3), (1, 20)])
def test_positions_equal_antialiased_bicubic(new):
    table = torch.randn(7, 7, 5)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=new, mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_positions(table, *new), expected[0].permute(1, 2, 0))
    assert torch.equal(resize_positions(table, 7, 7), table)


@pytest.mark.parametrize("size", [(1, 1), (5, 37), (33, 32)])
def test_any_size_is_padded_at_the_right_and_bottom(size):
    model, _ = build(NANO)
    x = torch.randn(2, 3, *size)
    whole = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    assert torch.equal(model(x), model(whole))


@pytest.mark.parametrize("pool", ["token", "avg", "map", "ep", ""])
def test_read_outs(pool):
    model, x = build(NANO, global_pool=pool)
    assert model(x).shape == ((2, 65, 10) if pool == "" else (2, 10))
    model.train()(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_efficient_probing_reads_the_patches():
    model, x = build("va_minimal_vit_micro_patch4_32_ep")
    model, x = model.double(), x.double()
    patches = model.forward_features(x)[:, 1:]
    pool = model.attn_pool
    attention = (pool.queries @ patches.transpose(1, 2) / 96**0.5).softmax(-1)  # (B, 32, 64)
    values = (attention @ patches @ pool.value.weight.T).unflatten(2, (32, 3))
    own = torch.stack([values[:, m, m] for m in range(32)], 1).flatten(1)  # query m has rows 3 m to 3 m + 2
    torch.testing.assert_close(model(x), model.head(own), rtol=1e-10, atol=1e-10)


def test_read_out_can_be_replaced():
    model, x = build(NANO)
    model.reset_classifier(3, "ep")
    assert model.global_pool == "ep"
    assert model(x).shape == (2, 3)
    pool = model.attn_pool
    model.reset_classifier(4)
    assert model.attn_pool is pool
    model.reset_classifier(5, "avg")
    assert model.attn_pool is None
    assert model(x).shape == (2, 5)


def test_attention_maps_of_a_block():
    model, x = build(f"{NANO}_minimum")
    seen = []
    model.blocks[-1].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(x)
    weights = model.blocks[-1].attn.attention_weights(seen[0])
    assert weights.shape == (2, 1, 65, 65)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 65))


def test_near_names_are_suggested():
    assert "va_minimal_vit_nano_patch4_32_minimum" in visionattn.models.suggest("minimal_vit_nano_patch4_32_minimum")
