"""Every mixer against the contract, and its limit."""

import pytest
import torch

from tests.mixers.contract import DIM, GRID, HEADS, LIMITS, MixerContract, tokens
from visionattn.mixers import MIXERS


class TestEveryMixer(MixerContract):
    pass


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_limit_is_softmax_attention(name):
    torch.manual_seed(0)
    mixer = MIXERS[name](DIM, HEADS, **LIMITS[name], dtype=torch.float64)
    softmax = MIXERS["softmax"](DIM, HEADS, dtype=torch.float64)
    missing, unexpected = mixer.load_state_dict(softmax.state_dict(), strict=False)
    assert unexpected == []
    assert sum(mixer.get_parameter(key).numel() for key in missing) == mixer.extra_parameters()
    x = tokens(mixer, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, GRID), softmax(x, GRID), rtol=0, atol=1e-10)
