r"""Hierarchical self-attention: softmax attention with weights tied between distant windows.

The grid is divided into windows of g x g tokens, windows may be grouped into larger ones, and the groups of the last
level are siblings under one root. Let B, C be siblings, n_C the number of keys of C, q_B, k_C, v_C the means over their
tokens, and l_B the own logit of B (for a token: q_B . k_B / sqrt(D)):

    u_BC = q_B . k_C / sqrt(D) + log n_C      for C != B,       u_BB = l_B
    m_B  = softmax over C of u_BC
    y_i  <- m_BB y_i + sum over C != B of m_BC v_C               for every token i of B; initially y_i = v_i
    l_A  = mean over B in A of log sum_C exp(u_BC)               weighted by the tokens of B: the parent's own logit

One level of windows (`windows=(g,)`) thus computes softmax attention inside each window and one attention of window
means between windows. Among all row-stochastic matrices with entries tied in this way (one number per ordered pair of
siblings), this one is nearest to softmax attention: it minimises sum_i KL(tied row i || softmax row i).

Prefix tokens are leaves next to the groups of the last level, as keys with the logit q_B . k_0 / sqrt(D); as queries
they see all tokens. The core has no parameters, so the weights of a plain ViT load.

Source: Hierarchical Self-Attention, arXiv 2509.15448 (Theorem 3.2).

Deviations, and why. Logits are those of scaled dot-product attention rather than distances; if a grid is not divisible
by g, the windows at its right and lower border are smaller.

Cost with one level: 2 N g^2 C + 2 (N / g^2)^2 C multiply-accumulates; no N x N matrix is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, softmax_attention

__all__ = ["HierarchicalMixer", "hierarchical_attention"]


def group(x: Tensor, side: int) -> Tensor:
    """Divide maps into windows, padded with zeros: (B, heads, H, W, D) -> (B, heads, H', W', side^2, D)."""
    rows, columns = (x.shape[2] + side - 1) // side, (x.shape[3] + side - 1) // side
    x = F.pad(x, (0, 0, 0, columns * side - x.shape[3], 0, rows * side - x.shape[2]))
    return x.unflatten(3, (columns, side)).unflatten(2, (rows, side)).transpose(3, 4).flatten(4, 5)


def spread(x: Tensor, side: int, like: Tensor) -> Tensor:
    """Undo `group`: (B, heads, H', W', side^2, D) -> (B, heads, H, W, D), H and W as in `like`."""
    x = x.unflatten(4, (side, side)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    rows, columns = torch.arange(like.shape[2], device=x.device), torch.arange(like.shape[3], device=x.device)
    return x.index_select(2, rows).index_select(3, columns)  # a slice's strides would depend on dynamic sizes


def log(counts: Tensor) -> Tensor:
    """Logarithm; for zero, a value so low that its exponential is negligible, yet finite in float16."""
    return torch.where(counts > 0, counts.clamp(min=1).log(), -3e4)


def siblings(q: Tensor, k: Tensor, v: Tensor, own: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S siblings to S + P nodes, the first S of which are the siblings.

    Args:
        q: Mean queries (..., S, D).
        k: Mean keys (..., S + P, D).
        v: Mean values (..., S + P, D).
        own: The siblings' own logits (..., S, 1), the diagonal.
        counts: Number of valid keys per node (..., S + P, 1).

    Returns:
        The attention weight m_BB of each sibling to itself, the weighted values of the other nodes, and the log-sum-exp
        of its logits.
    """
    inside = torch.arange(q.shape[-2], device=q.device)[:, None] == torch.arange(k.shape[-2], device=q.device)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + log(counts).transpose(-2, -1)
    logits = torch.where(inside, own, logits)
    total = logits.logsumexp(dim=-1, keepdim=True)
    others = (logits - total).exp().masked_fill(inside, 0.0)
    return (own - total).exp(), others @ v, total


def hierarchical_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, windows: list[int], mask: Maybe = None
) -> Tensor:
    """Attention over a tree of windows (equations: see the module).

    Args:
        q: Queries (B, heads, P + H W, D), prefix tokens first.
        k: Keys, as q.
        v: Values, as q.
        grid: (H, W).
        windows: Side of the windows in tokens, then of groups in windows, and so on; all groups of the last level are
            siblings.
        mask: Valid keys (B, P + H W) bool. Invalid tokens are also left out of the mean queries.

    Returns:
        As q.
    """
    prefix = q.shape[2] - grid[0] * grid[1]
    first = softmax_attention(q[:, :, :prefix], k, v, mask)
    counts = torch.ones_like(q[:1, :1, :, :1]) if mask is None else mask[:, None, :, None].to(q.dtype)
    prefix_k, prefix_v, prefix_n = k[:, :, :prefix], v[:, :, :prefix], counts[:, :, :prefix]
    own = (q * k).sum(dim=-1, keepdim=True) * q.shape[-1] ** -0.5 + log(counts)
    q, k, v, own, counts = [x[:, :, prefix:].unflatten(2, (grid[0], grid[1])) for x in (q, k, v, own, counts)]

    y = v  # (B, heads, H, W, D)
    maps: list[Tensor] = []
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for side in windows:
        maps.append(v)
        q, k, v, own, n = [group(x, side) for x in (q, k, v, own, counts)]  # (B, heads, H', W', side^2, D or 1)
        share, added, total = siblings(q, k, v, own, n)
        inner.append(share)
        outer.append(added)
        counts = n.sum(dim=4)
        weight = n / counts.clamp(min=1).unsqueeze(4)  # means over the siblings, weighted by their tokens
        q, k, v, own = [(weight * x).sum(dim=4) for x in (q, k, v, total)]
        own = torch.where(counts > 0, own, log(counts))

    q, own = q.flatten(2, 3), own.flatten(2, 3)
    k, values = torch.cat([k.flatten(2, 3), prefix_k], dim=2), torch.cat([v.flatten(2, 3), prefix_v], dim=2)
    share, added, _ = siblings(q, k, values, own, torch.cat([counts.flatten(2, 3), prefix_n], dim=2))
    share, added = [x.unflatten(2, (v.shape[2], v.shape[3])) for x in (share, added)]
    for level in range(len(windows) - 1, -1, -1):
        share, added = share.unsqueeze(4), added.unsqueeze(4)
        added = spread(share * outer[level] + added, windows[level], maps[level])
        share = spread(share * inner[level], windows[level], maps[level])
    return torch.cat([first, (share * y + added).flatten(2, 3)], dim=2)


class HierarchicalMixer(Mixer):
    """Softmax attention inside windows, tied weights between them (see the module; other arguments: see `Mixer`).

    Args:
        windows: Side g of the windows in tokens; or several sides: of windows in tokens, of groups in windows, ...

    Raises:
        InputError: `windows` is empty, or a side is below 1.
    """

    supports = frozenset({"prefix", "mask", "any_grid", "script", "onnx"})
    limit = "windows of one token, or one window as large as a grid without prefix tokens"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        windows: int | tuple[int, ...] = 7,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        self.windows = [windows] if isinstance(windows, int) else list(windows)
        if not self.windows or min(self.windows) < 1:
            raise InputError(f"windows must be one side or more, each at least 1; got {windows}.")

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend over the tree."""
        return hierarchical_attention(q, k, v, grid, self.windows, mask)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention between the siblings of all levels."""
        pairs, nodes = 0, n
        for side in self.windows:
            pairs += nodes * min(side**2, nodes)
            nodes = -(-nodes // side**2)
        return 2 * (pairs + nodes**2) * self.dim
