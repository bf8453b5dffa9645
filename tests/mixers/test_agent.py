"""Agent attention against its definition, the paper's parameters, and its cost."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.contract import peak_memory, randomise
from visionattn.errors import InputError
from visionattn.mixers import MIXERS


@pytest.mark.parametrize(("grid", "prefix"), [((6, 6), 1), ((5, 7), 0), ((9, 4), 2)])
def test_definition(grid, prefix):
    torch.manual_seed(0)
    mixer = randomise(MIXERS["agent"](12, 3, num_agents=9, grid_size=(6, 6), dtype=torch.float64)).eval()
    x = torch.randn(2, prefix + grid[0] * grid[1], 12, dtype=torch.float64)
    q, k, v = [t.unflatten(-1, (3, 4)).transpose(1, 2) for t in mixer.qkv(x).chunk(3, dim=-1)]
    agents = F.adaptive_avg_pool2d(q[:, :, prefix:].transpose(2, 3).flatten(1, 2).unflatten(-1, grid), 3)
    agents = agents.flatten(2).unflatten(1, (3, 4)).transpose(2, 3)  # (B, heads, 9, D)

    def resized(table):  # (heads, 9, a, b) -> (heads, 9, H W)
        return F.interpolate(table, size=grid, mode="bilinear").flatten(2)

    def columns_first(table):
        return table.movedim(-1, 1)  # (heads, a, b, 9) -> (heads, 9, a, b)

    one = resized(mixer.an_bias) + resized(mixer.ah_bias[0]) + resized(mixer.aw_bias[0])
    two = resized(mixer.na_bias) + resized(columns_first(mixer.ha_bias[0])) + resized(columns_first(mixer.wa_bias[0]))
    one = torch.cat([mixer.ac_bias[0].expand(-1, -1, prefix), one], dim=-1)
    two = torch.cat([mixer.ca_bias[0].transpose(1, 2).expand(-1, -1, prefix), two], dim=-1)
    gathered = (agents @ k.transpose(-2, -1) / 2 + one).softmax(dim=-1) @ v
    y = (q @ agents.transpose(-2, -1) / 2 + two.transpose(-2, -1)).softmax(dim=-1) @ gathered
    y = y.transpose(1, 2).flatten(2)
    maps = v[:, :, prefix:].transpose(1, 2).flatten(2).transpose(1, 2).unflatten(-1, grid)
    convolved = F.conv2d(maps, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=12).flatten(2).transpose(1, 2)
    y = torch.cat([y[:, :prefix], y[:, prefix:] + convolved], dim=1)
    torch.testing.assert_close(mixer(x, grid), mixer.proj(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "heads", "agents", "extra"), [(192, 3, 49, 24852), (384, 6, 49, 49704)])
def test_parameters_of_the_paper(dim, heads, agents, extra):
    assert MIXERS["agent"](dim, heads, num_agents=agents, grid_size=14).extra_parameters() == extra


def test_cost():
    mixer = MIXERS["agent"](96, 3, num_agents=49, grid_size=56).eval()
    assert peak_memory(mixer, torch.randn(1, 3136, 96), (56, 56)) < 3 * 3136**2 * 4 / 4


def test_bad_settings():
    with pytest.raises(InputError, match="num_agents must be a square number and grid_size at least 1; got 48"):
        MIXERS["agent"](8, 2, num_agents=48)
