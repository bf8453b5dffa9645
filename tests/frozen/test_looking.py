"""What attention does, layer by layer."""

import math

import pytest
import timm
import torch
from timm.layers import Attention

from visionattn.errors import InputError
from visionattn.frozen import observing
from visionattn.frozen.looking import look
from visionattn.frozen.sinks import channel_share, outliers

IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**settings, **options}).eval()


@torch.no_grad()
def test_rows_are_those_of_the_weights():
    model = vit()
    calls, inputs = [], []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with observing(model, calls.append):
        model(IMAGES)
    handle.remove()
    weights = (calls[1].q @ calls[1].k.transpose(2, 3) * calls[1].scale).softmax(-1)  # (2, 2, 37, 37)
    got = look(model, IMAGES)
    row = got.layers[1]
    assert row.layer == "blocks.1.attn"
    assert row.keys == 37
    assert row.effective_keys == pytest.approx(float(torch.special.entr(weights).sum(-1).exp().mean()), rel=1e-5)
    received = weights.mean(dim=(1, 2)) * 37  # (2, 37)
    assert row.received == pytest.approx(float(received.max(1).values.mean()), rel=1e-5)
    assert row.received_by_class == float((received.argmax(1) == 0).double().mean())
    assert row.class_share == pytest.approx(float(received[:, 0].mean()) / 37, rel=1e-5)
    torch.testing.assert_close(got.maps[1], weights[:, :, 0, 1:].mean(1))
    assert torch.equal(got.sinks[1], outliers(got.maps[1]))
    assert row.outliers == float(got.sinks[1].sum(1).double().mean())
    assert row.received_sinks == float((received > 10).sum(1).double().mean())
    shares = channel_share(inputs[0])
    assert row.channel_share == pytest.approx(float(shares.mean()), rel=1e-5)
    assert row.channel_sinks == pytest.approx(float((shares > 0.1).sum(1).double().mean()))
    assert 0 < row.tiles <= 1
    assert 0 <= row.overlap <= 1
    assert got.layers[0].to_json()["overlap"] is None
    assert got.grid == (6, 6)
    assert got.has_class


@torch.no_grad()
def test_uniform_attention_looks_at_all_keys():
    model = vit(class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn.qkv.weight[:32].zero_()
        block.attn.qkv.bias.zero_()
    got = look(model, IMAGES)
    row = got.layers[0]
    assert row.effective_keys == pytest.approx(36, rel=1e-4)
    assert row.received == pytest.approx(1, rel=1e-4)
    assert math.isnan(row.class_share)
    assert row.tiles == pytest.approx(33 / 36)  # tiles of one patch, of which 33 hold 90 %
    assert not got.has_class
    assert not any(block._forward_hooks for block in model.blocks)


@torch.no_grad()
def test_registers_are_no_class_token():
    got = look(vit(class_token=False, reg_tokens=2, global_pool="avg"), IMAGES)
    assert not got.has_class
    assert got.layers[0].keys == 38
    assert got.maps[0].shape == (2, 36)
    assert math.isnan(got.layers[0].class_share)


class WithoutPatches(torch.nn.Module):
    """Attends over pixels, and has no patch embedding that says a grid."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(4, num_heads=1)

    def forward(self, images):
        return self.attention(images[:, :, ::16, ::16].flatten(2).transpose(1, 2).repeat(1, 1, 2)[..., :4])


def test_models_without_a_grid_are_refused():
    with pytest.raises(InputError, match="no layer that attends over a grid"):
        look(WithoutPatches().eval(), torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="No attention layer of ResNet"):
        look(timm.create_model("resnet18").eval(), torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="No attention layer"):
        look(timm.create_model("swinv2_cr_tiny_224", img_size=64, window_size=2).eval(), torch.zeros(1, 3, 64, 64))
