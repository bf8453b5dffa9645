"""Pooled re-read against plain pooling and attention."""

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.contract import randomise
from visionattn.errors import InputError
from visionattn.mixers import MIXERS


@pytest.mark.parametrize(("grid", "pool"), [((4, 6), 2), ((5, 7), 3), ((3, 3), 1)])
def test_starts_as_plain_pooling(grid, pool):
    mixer = MIXERS["reread"](12, 3, pool=pool, dtype=torch.float64)
    x = torch.randn(2, 1 + grid[0] * grid[1], 12, dtype=torch.float64)
    cells = x[:, 1:].transpose(1, 2).unflatten(2, grid)
    means = F.avg_pool2d(cells, pool, ceil_mode=True, count_include_pad=False)
    expected = torch.cat([x[:, :1], means.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(mixer.pooled(x, grid), expected, rtol=0, atol=1e-12)
    spread = means.repeat_interleave(pool, 2).repeat_interleave(pool, 3)[..., : grid[0], : grid[1]]
    torch.testing.assert_close(mixer(x, grid)[:, 1:], spread.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)


def test_pooled_tokens_read_the_full_ones():
    torch.manual_seed(0)
    mixer = randomise(MIXERS["reread"](12, 3, pool=2, dtype=torch.float64))
    softmax = MIXERS["softmax"](12, 3, dtype=torch.float64)
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 6)), 2).flatten(2).transpose(1, 2)
    expected = pooled + mixer.gate.tanh() * softmax(pooled, (2, 3), x)
    torch.testing.assert_close(mixer.pooled(x, (4, 6)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixer(pooled, (2, 3), x), expected, rtol=0, atol=1e-12)


def test_bad_settings():
    with pytest.raises(InputError, match="pool must be at least 1; got 0"):
        MIXERS["reread"](8, 2, pool=0)
