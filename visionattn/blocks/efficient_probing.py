r"""Efficient probing: a few learned queries pool frozen tokens, each for one slice of the output feature.

With tokens X of shape (B, N, D), queries q_1 .. q_M of shape (D,), shared by all images, and a value matrix W of shape
(D_o, D), split by rows into M blocks W_m of shape (D_o / M, D):

    a_m = softmax over n of X q_m / sqrt(D)      (B, N)
    z_m = a_m X                                  (B, D)
    y_m = W_m z_m                                (B, D_o / M)
    y   = [y_1, ..., y_M]                        (B, D_o)

There is no projection of keys, queries or outputs, no norm and no position: M D + D D_o parameters. A query uses the
whole width D, whereas a head of multi-head attention sees a slice of it; only the values are split. Multi-head
cross-attention with one learned query is a special case, which `fold_multi_head` converts to this form.

Source: Efficient Probing, arXiv 2506.10178.

Deviations, and why. Values are projected after averaging, 4 M N D + 2 D D_o operations per image; the authors
project all N tokens first, 2 N D D_o of their 2 N D D_o + 2 M N D + 2 N D_o. W_m is linear, so both are the same
function, also with a value bias, since attention weights sum to 1. The batch norm that follows in the authors' probe
belongs to the classifier. Tokens can be masked, and the attention can be returned.
"""

import torch
import torch.nn as nn

from visionattn.errors import InputError

__all__ = ["EfficientProbing", "fold_multi_head"]


class EfficientProbing(nn.Module):
    """Pooling of tokens by learned queries (equations: see the module).

    Args:
        dim: Width D of the tokens.
        num_queries: Queries M.
        out_dim: Width D_o of the feature, a multiple of M; D if None.
        value_bias: Add a bias to the values, as a folded head with a batch norm requires.

    Shape:
        (B, N, D) -> (B, D_o), any N.

    Raises:
        InputError: A width or the number of queries is less than 1, or D_o is not divisible by M.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 32,
        out_dim: int | None = None,
        value_bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        out_dim = dim if out_dim is None else out_dim
        if min(dim, num_queries, out_dim) < 1 or out_dim % num_queries:
            raise InputError(
                f"Widths and num_queries must be at least 1 and out_dim divisible by num_queries; got dim {dim}, "
                f"out_dim {out_dim} and num_queries {num_queries}."
            )
        self.num_queries = num_queries
        self.queries = nn.Parameter(torch.empty(num_queries, dim, **dd))
        self.value = nn.Linear(dim, out_dim, bias=value_bias, **dd)  # W_m is rows m D_o / M to (m + 1) D_o / M
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, return_attention: bool = False):
        """Pool tokens: the feature (B, D_o), or the feature and the attention (B, M, N).

        Args:
            tokens: (B, N, D).
            mask: (B, N), bool, True for valid tokens. An image without any gives zeros, or the bias.
            return_attention: Also return the attention weights a_m. TorchScript, where a function has one return type,
                and an fx trace of this module alone return only the feature.
        """
        z, attention = torch.ops.visionattn.multi_query_pool(tokens, self.queries, mask)  # (B, M, D), (B, M, N)
        weight = self.value.weight.unflatten(0, (self.num_queries, -1))  # (M, D_o / M, D)
        y = torch.einsum("bmd,mod->bmo", z, weight).flatten(1)
        if self.value.bias is not None:
            y = y + self.value.bias
        # Compared by identity: in an fx trace the argument is not a bool.
        if torch.jit.is_scripting() or return_attention is not True:
            return y
        return y, attention


@torch.no_grad()
def fold_multi_head(
    query: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    num_heads: int,
    mean: torch.Tensor | None = None,
    inv_std: torch.Tensor | None = None,
) -> EfficientProbing:
    """Convert multi-head cross-attention with one learned query, such as AIM's pooling, to efficient probing.

    Head h of width d scores token x by u_h . K_h x' / sqrt(d) and averages V_h x', where x' = s (x - mean) is the token
    after a batch norm without affine, in evaluation. Terms shared by all tokens cancel in the softmax, so

        q_h = sqrt(D / d) s K_h^T u_h      W_h = V_h diag(s)      bias = -V (s mean)

    computed in float64 and returned in the dtype of the weights.

    Args:
        query: The learned query u, K elements in any shape.
        key_weight: Weight of the key projection, (K, D).
        value_weight: Weight of the value projection, (D_o, D).
        num_heads: Heads, which become the queries: K and D_o must be divisible by M = `num_heads`.
        mean: Running mean of the batch norm, (D,); without one the result has no value bias.
        inv_std: s = 1 / sqrt(running variance + eps), (D,); ones if None.

    Returns:
        The pooling, with new parameters on the device of the weights.

    Raises:
        InputError: The sizes do not match.
    """
    norms = [x for x in (mean, inv_std) if x is not None]
    if (
        key_weight.ndim != 2
        or any(shape != key_weight.shape[1:] for shape in (value_weight.shape[1:], *(x.shape for x in norms)))
        or query.numel() != len(key_weight)
        or num_heads < 1
        or len(key_weight) % num_heads
    ):
        given = ", ".join(str(tuple(x.shape)) for x in (query, key_weight, value_weight, *norms))
        raise InputError(
            f"Folding {num_heads} heads needs a query of K elements, weights (K, D) and (D_o, D), a mean and an "
            f"inverse deviation (D,), with K and D_o divisible by the heads; got the shapes {given}."
        )
    (keys, dim), device = key_weight.shape, key_weight.device
    has_bias = mean is not None
    pool = EfficientProbing(dim, num_heads, len(value_weight), has_bias, device=device, dtype=key_weight.dtype)
    scale = torch.ones(dim, dtype=torch.float64, device=device) if inv_std is None else inv_std.double()
    heads = key_weight.double().unflatten(0, (num_heads, -1))  # (M, K / M, D)
    queries = torch.einsum("mkd,mk->md", heads, query.double().reshape(num_heads, -1))
    pool.queries.copy_(queries * scale * (dim * num_heads / keys) ** 0.5)
    weight = value_weight.double() * scale
    pool.value.weight.copy_(weight)
    if mean is not None:
        pool.value.bias.copy_(-weight @ mean.double())
    return pool
