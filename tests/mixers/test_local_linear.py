"""Local linear attention against weighted least squares, Parallax against its covariance and flash-linear-attention."""

import pytest
import torch

from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.core import softmax_attention
from visionattn.mixers.local_linear import local_linear_attention, parallax_attention


def draw(width: int = 4, tokens: int = 15) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(4, 2, 3, tokens, width, dtype=torch.float64))


def test_fit_is_weighted_ridge_regression():
    """The intercept at the query of min sum_j w_j |v_j - b - M (k_j - q)|^2 + lambda |M|^2."""
    q, k, v, _ = draw()
    weights = (q @ k.transpose(-2, -1) / 2).softmax(dim=-1)
    expected = torch.empty_like(v)
    ridge = torch.diag(torch.tensor([0.0, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64))
    for batch in range(2):
        for head in range(3):
            for i in range(15):
                near = k[batch, head] - q[batch, head, i]
                design = torch.cat([torch.ones(15, 1, dtype=torch.float64), near], dim=1)
                weighted = weights[batch, head, i, :, None] * design
                fitted = torch.linalg.solve(design.T @ weighted + ridge, weighted.T @ v[batch, head])
                expected[batch, head, i] = fitted[0]
    torch.testing.assert_close(local_linear_attention(q, k, v, 0.3), expected, rtol=0, atol=1e-10)


def test_affine_values_come_back():
    q, k, _, _ = draw()
    matrix, offset = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    fitted = local_linear_attention(q, k, k @ matrix + offset, 1e-9)
    torch.testing.assert_close(fitted, q @ matrix + offset, rtol=0, atol=1e-5)
    assert (softmax_attention(q, k, k @ matrix + offset) - fitted).abs().max() > 1


def test_large_regularisation_is_softmax_attention():
    q, k, v, _ = draw()
    torch.testing.assert_close(local_linear_attention(q, k, v, 1e12), softmax_attention(q, k, v), rtol=0, atol=1e-10)


def test_parallax_is_softmax_less_a_covariance():
    q, k, v, r = draw()
    weights = (q @ k.transpose(-2, -1) / 2).softmax(dim=-1)
    mean_k, mean_v = weights @ k, weights @ v
    centred = k[:, :, None] - mean_k[:, :, :, None]  # (B, heads, N, M, D)
    covariance = torch.einsum("bhnm,bhnmd,bhnme->bhnde", weights, centred, v[:, :, None] - mean_v[:, :, :, None])
    expected = mean_v - torch.einsum("bhnd,bhnde->bhne", r, covariance)
    torch.testing.assert_close(parallax_attention(q, r, k, v), expected, rtol=0, atol=1e-12)


def test_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.parallax.naive", reason="fla-core is not installed")
    q, k, v, r = (x.float() for x in draw())
    expected = naive.naive_parallax(*[x.transpose(1, 2) for x in (q, r, k, v)], causal=False).transpose(1, 2)
    torch.testing.assert_close(parallax_attention(q, r, k, v), expected, rtol=0, atol=1e-5)


def test_cost():
    mixer = MIXERS["parallax"](192, 3)
    assert mixer.extra_parameters() == 192**2 + 192
    assert mixer.macs(196) == 5 * 196 * 192**2 + 3 * 196**2 * 192


def test_bad_settings():
    with pytest.raises(InputError, match="regularisation must be positive; got 0"):
        MIXERS["local_linear"](8, 2, regularisation=0)
