"""Controls against timm's attention, and against what they claim."""

import torch
import torch.nn.functional as F
from timm.layers import Attention

from tests.mixers.contract import make
from visionattn.mixers import MIXERS

X = torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = (3, 5)


def values(mixer):
    return mixer.qkv(X)[..., 24:]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_softmax_is_timms_attention():
    theirs = Attention(12, 3, qkv_bias=True).double()
    ours = MIXERS["softmax"](12, 3, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    close(ours(X, GRID), theirs(X))
    assert ours.macs(196) == 4 * 196 * 12**2 + 2 * 196**2 * 12


def test_identity_and_mean():
    mixer = make("identity", {}, dtype=torch.float64)
    close(mixer(X, GRID), mixer.proj(values(mixer)))
    mixer = make("mean", {}, dtype=torch.float64)
    close(mixer(X, GRID), mixer.proj(values(mixer).mean(dim=1, keepdim=True)).expand_as(X))


def test_pooling_of_neighbours():
    mixer = make("pool3x3", {}, dtype=torch.float64)
    v = values(mixer)
    cells = v[:, 2:].unflatten(1, GRID)
    y = torch.zeros_like(v)
    for i in range(3):
        for j in range(5):
            near = cells[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            y[:, 2 + i * 5 + j] = near.mean(dim=(1, 2)) - cells[:, i, j]
    close(mixer(X, GRID), mixer.proj(y))


def test_softmax_with_a_convolution():
    mixer = make("softmax_conv", {}, dtype=torch.float64)
    softmax = MIXERS["softmax"](12, 3, dtype=torch.float64)
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    maps = values(mixer)[:, 2:].transpose(1, 2).unflatten(2, GRID)
    convolved = F.conv2d(maps, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=12).flatten(2).transpose(1, 2)
    expected = softmax(X, GRID) + F.linear(F.pad(convolved, (0, 0, 2, 0)), mixer.proj.weight)
    close(mixer(X, GRID), expected)
