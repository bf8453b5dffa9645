"""Softplus attention against its definition, its sparsity, and half precision."""

import math

import pytest
import torch

from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.softplus import softplus_weights


@pytest.mark.parametrize("power", [None, 1.0, 3.0, 15.0])
def test_definition(power):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 16, dtype=torch.float64)
    found = softplus_weights(q, k, power)
    for head in range(2):
        for i in range(9):
            row = []
            for j in range(9):
                a, b = q[0, head, i], k[0, head, j]
                row.append(math.log1p(math.exp(math.log(16) * math.log(9) * float(a @ b / (a.norm() * b.norm())))))
            row = [value / sum(row) for value in row]
            if power is not None:
                row = [max(9 * value - 1, 0) ** power for value in row]
                row = [value / sum(row) for value in row]
            torch.testing.assert_close(found[0, head, i], torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-10)


def test_entropy_falls_with_the_power():
    """Row entropies of 64 random keys of width 16: about 3.5, 2.8, 2.0 and 0.5 nats; two thirds are exact zeros."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 4, 64, 16, dtype=torch.float64)
    found = [softplus_weights(q, k, power) for power in (None, 1.0, 3.0, 15.0)]
    entropies = [-(w * w.clamp(min=1e-300).log()).sum(dim=-1).mean().item() for w in found]
    assert entropies == pytest.approx([3.54, 2.83, 1.97, 0.47], abs=0.06)
    assert [round((w == 0).double().mean().item(), 1) for w in found[1:]] == [0.6, 0.6, 0.6]


def test_equal_keys_keep_equal_weights():
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 5, 8)
    torch.testing.assert_close(softplus_weights(q, k, 3.0), torch.full((1, 1, 3, 5), 0.2))


def test_high_powers_in_half_precision():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 400, 16)
    exact = softplus_weights(q.half().double(), q.half().double(), 15.0)
    found = softplus_weights(q.half(), q.half(), 15.0)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.05


def test_bad_settings():
    with pytest.raises(InputError, match="power must be positive or None; got 0"):
        MIXERS["lssa"](8, 2, power=0)
