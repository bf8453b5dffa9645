r"""Local linear attention: softmax attention corrected by the slope of the values around the query.

Softmax attention fits a constant to the values near q_i. With s_ij = q_i . k_j / sqrt(D), a local linear fit is

    w_ij = exp(s_ij),   omega_i = sum_j w_ij,   mu_i = sum_j w_ij (k_j - q_i)
    Sigma_i = sum_j w_ij (k_j - q_i)(k_j - q_i)^T + lambda omega_i I,      rho_i = Sigma_i^-1 mu_i
    y_i = sum_j w_ij (1 - rho_i . (k_j - q_i)) v_j / (omega_i - rho_i . mu_i)                            exact form

For lambda -> 0 it reproduces affine values v_j = M k_j + b exactly; the weights sum to 1 and may be negative. Parallax
learns a second query instead of solving N linear systems:

    r_i = W_R x_i,   A = softmax(s),   R_ij = r_i . k_j                                          (not scaled)
    y_i = (A V)_i (1 + sum_j A_ij R_ij) - ((A o R) V)_i = (A V)_i - r_i^T Cov_A(k, v)_i          Parallax

W_R starts at zero, so that a pretrained transformer initially computes what it did before.

Sources: Local Linear Attention, arXiv 2510.01450; Parallax, arXiv 2605.29157.

Deviation. Neither form is causal here. The exact form is a reference: it builds and solves N systems of D x D per head,
for which ONNX has no operator.

Cost: Parallax 3 N M C + N C^2 multiply-accumulates, with the N x N matrix; exact N M D C + N C D^2 / 3 and more.
"""

import torch
import torch.nn as nn
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer

__all__ = ["LocalLinearMixer", "ParallaxMixer", "local_linear_attention", "parallax_attention"]


def softmax_weights(q: Tensor, k: Tensor, mask: Maybe) -> Tensor:
    """Softmax over the valid keys, (B, heads, N, M)."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    return logits.softmax(dim=-1)


def parallax_attention(q: Tensor, r: Tensor, k: Tensor, v: Tensor, mask: Maybe = None) -> Tensor:
    """Softmax attention minus the covariance of keys and values in the direction r (equations: see the module).

    Args:
        q: Queries (B, heads, N, D).
        r: Second queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, D).
        mask: Valid keys (B, M) bool.

    Returns:
        (B, heads, N, D).
    """
    weights = softmax_weights(q, k, mask)
    slopes = weights * (r @ k.transpose(-2, -1))
    return (weights * (1 + slopes.sum(dim=-1, keepdim=True)) - slopes) @ v


def local_linear_attention(q: Tensor, k: Tensor, v: Tensor, regularisation: float = 10.0, mask: Maybe = None) -> Tensor:
    """Local linear fit of the values at each query, in the exact form (equations: see the module).

    Args:
        q: Queries (B, heads, N, D).
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, Dv).
        regularisation: Ridge lambda, relative to the sum of the weights.
        mask: Valid keys (B, M) bool.

    Returns:
        (B, heads, N, Dv).
    """
    weights = softmax_weights(q, k, mask)  # omega = 1
    difference = k[:, :, None] - q[:, :, :, None]  # (B, heads, N, M, D)
    weighted = weights[..., None] * difference
    mu = weighted.sum(dim=3)  # (B, heads, N, D)
    ridge = regularisation * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    sigma = weighted.transpose(-2, -1) @ difference + ridge
    rho = torch.linalg.solve(sigma, mu[..., None])  # (B, heads, N, D, 1)
    fitted = weights * (1 - (difference @ rho)[..., 0])
    return fitted @ v / (1 - mu[..., None, :] @ rho)[..., 0]


class ParallaxMixer(Mixer):
    """Softmax attention with a learned local slope (equations: see the module; arguments: see `Mixer`)."""

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script", "onnx"})
    limit = "W_R = 0, as at the start"
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        self.r = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        nn.init.zeros_(self.r.weight)
        if self.r.bias is not None:
            nn.init.zeros_(self.r.bias)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend, then correct by the slope."""
        return parallax_attention(q, self.split_heads(self.r(x)), k, v, mask)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Two products for the scores, one for the values, and W_R."""
        return 3 * n * m * self.dim + n * self.dim**2


class LocalLinearMixer(Mixer):
    """The exact local linear fit, a slow reference (equations: see the module; other arguments: see `Mixer`).

    Args:
        regularisation: Ridge lambda.

    Raises:
        InputError: `regularisation` is not positive.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "script"})
    limit = "lambda to infinity"
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        regularisation: float = 10.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if regularisation <= 0:
            raise InputError(f"regularisation must be positive; got {regularisation}.")
        self.regularisation = float(regularisation)

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Fit at each query."""
        return local_linear_attention(q, k, v, self.regularisation, mask)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """The matrices Sigma, their solution, and attention."""
        return n * m * self.dim * (self.dim_head + 4) + n * self.dim * self.dim_head**2 // 3
