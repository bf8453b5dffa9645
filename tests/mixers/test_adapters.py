"""Blocks as mixers against the blocks."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.contract import randomise
from visionattn.blocks import HaloAttention, MinimalAttention
from visionattn.errors import InputError
from visionattn.mixers import MIXERS


def test_halo_is_the_block():
    torch.manual_seed(0)
    mixer = randomise(MIXERS["halo"](12, 3, block_size=2, halo_size=1, dtype=torch.float64))
    block = HaloAttention(12, num_heads=3, block_size=2, halo_size=1, qkv_bias=True, dtype=torch.float64)
    block.pos_embed.load_state_dict(mixer.pos_embed.state_dict())
    weight, bias = mixer.qkv.weight, mixer.qkv.bias
    # The block has the keys and values of each head side by side.
    rows = torch.arange(12, 36).view(2, 3, 4).transpose(0, 1).flatten()
    with torch.no_grad():
        block.q.weight.copy_(weight[:12, :, None, None])
        block.q.bias.copy_(bias[:12])
        block.kv.weight.copy_(weight[rows][:, :, None, None])
        block.kv.bias.copy_(bias[rows])
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    y = block(x.transpose(1, 2).unflatten(2, (3, 5))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer(x, (3, 5)), mixer.proj(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "similarity"), [("tied", "shared"), ("collapsed",) * 2, ("symmetric",) * 2])
def test_minimal_forms_are_the_block(name, similarity):
    torch.manual_seed(0)
    mixer = randomise(MIXERS[name](12, 3, dtype=torch.float64))
    block = MinimalAttention(12, 3, similarity, dtype=torch.float64)
    block.load_state_dict(mixer.attn.state_dict())
    x = torch.randn(2, 16, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, (3, 5)), block(x), rtol=0, atol=1e-12)


def test_gate_as_written():
    torch.manual_seed(0)
    mixer = randomise(MIXERS["gate"](12, 3, dtype=torch.float64))
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    v = mixer.qkv(x)[..., 24:].transpose(1, 2).unflatten(2, (3, 5))
    h = F.conv2d(v, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=12)
    y = ((h + v) * (h.sigmoid() - 0.5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer(x, (3, 5)), mixer.proj(y), rtol=0, atol=1e-12)


def test_bad_settings():
    with pytest.raises(InputError, match="block_size must be at least 1 and halo_size at least 0; got 2 and -1"):
        MIXERS["halo"](8, 2, block_size=2, halo_size=-1)
