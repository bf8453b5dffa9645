"""Resampling by matrices against PyTorch's pooling and interpolation."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.mixers.resampling import averages, interpolate


@pytest.mark.parametrize(("n", "bins"), [(14, 7), (14, 5), (9, 9), (3, 7), (1, 4)])
def test_averages_are_adaptive_pooling(n, bins):
    x = torch.randn(2, n, dtype=torch.float64)
    torch.testing.assert_close(x @ averages(n, bins, x).T, F.adaptive_avg_pool1d(x, bins), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [(7, 5), (14, 3), (1, 9), (4, 1), (1, 1), (3, 20)], ids=str)
def test_bilinear_interpolation(size):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = interpolate(x, *size), F.interpolate(y, size, mode="bilinear")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    weight = torch.randn(size, dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-13)
