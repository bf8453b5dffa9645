"""Dynamic mask attention against its definition with a dense mask, and its cost."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.contract import peak_memory, randomise
from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.dma import dynamic_mask_attention


def test_definition():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 20, 4, dtype=torch.float64)
    bias = torch.randn(2, 3, 20, dtype=torch.float64)
    kept = bias >= bias.sort(dim=-1, descending=True).values[..., 6:7]
    logits = q @ k.transpose(-2, -1) / 2 + bias.masked_fill(~kept, float("-inf"))[:, :, None]
    found = dynamic_mask_attention(q, k, v, bias, 7)
    torch.testing.assert_close(found, logits.softmax(dim=-1) @ v, rtol=0, atol=1e-12)


def test_bias_of_keys():
    mixer = randomise(MIXERS["dma"](12, 3, dtype=torch.float64))
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    values = F.linear(x, mixer.qkv.weight[24:], mixer.qkv.bias[24:])
    expected = mixer.A * F.softplus(mixer.dt_proj(values))
    torch.testing.assert_close(mixer.importance(x), expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_keeps_a_share_of_the_keys():
    mixer = randomise(MIXERS["dma"](12, 3, reduction=4, dtype=torch.float64)).eval()
    x = torch.randn(1, 10, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = mixer.project(x, None)
    y = mixer.core(q, k, v, (2, 5), x, None, None)
    gradient = torch.autograd.grad(y.sum(), k)[0]
    assert (gradient.abs().sum(dim=-1) > 0).sum(dim=-1).tolist() == [[3, 3, 3]]  # ceil(10 / 4)


def test_limit_is_softmax_attention():
    mixer = MIXERS["dma"](12, 3, reduction=1, dtype=torch.float64)
    softmax = MIXERS["softmax"](12, 3, dtype=torch.float64)
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    torch.nn.init.zeros_(mixer.A)
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, (3, 5)), softmax(x, (3, 5)), rtol=0, atol=1e-12)


def test_cost():
    assert MIXERS["dma"](192, 3).extra_parameters() == 582
    matrix = 3 * 3136**2 * 4
    assert peak_memory(MIXERS["dma"](96, 3).eval(), torch.randn(1, 3136, 96), (56, 56)) < matrix / 4


def test_bad_settings():
    with pytest.raises(InputError, match="reduction must be at least 1; got 0"):
        MIXERS["dma"](8, 2, reduction=0)
