r"""Conditional cross-attention: one image, many questions. Conditions are queries, the image's tokens keys and values.

With image tokens X (B, N, D), computed once, and conditions c = 1 .. C, each a row u_c of a table or an external
vector, such as the text embedding of an attribute's name or a weighted mean of rows:

    e_c = u_c, m tokens of width W, or MLP(u_c)                    (m, W)
    Q   = LN(z) W_Q,  K = LN(X) W_K,  V = LN(X) W_V                z = e_c at first; heads of width d
    z   <- z + [softmax(Q K^T / sqrt(d)) V] W_O                    (B, C m, W)
    z   <- z + MLP(LN(z))                                          K blocks of these two lines, X stays as it is
    f_c = normalise(W_E [LN(z_1), .., LN(z_m)])                    (B, C, E), of length 1

Rows do not see each other: C conditions in one pass equal C single calls. Switching between attributes changes
c alone, and since X does not depend on it, a further condition costs a row, not a network.

A second source of tokens R (B, M, D_R) can be added, with its own keys and values and a weight s: the bracket
becomes softmax(Q K^T / sqrt(d)) V + s softmax(Q K'^T / sqrt(d)) V', K' = LN(R) W_K', V' = LN(R) W_V'. s = 0 gives the
network without it.

Sources: the idea of conditional cross-attention for attributes is from CCA, arXiv 2307.13254, of which only the
abstract was available: equations, sizes and losses here are ours, and no result of that paper is claimed. The decoupled
second source is IP-Adapter's, arXiv 2308.06721. `explain` divides by the map of a general question as in CARVE, arXiv
2509.06461.

Deviations, and why. K and V are never computed: Q_h K_h^T = (Q_h W_K,h^T) LN(X)^T, so queries are mapped to the
tokens' width D and tokens are averaged before W_V is applied. It is the same function, at 2 N D per query and head
instead of 2 N D W per image, so cheaper up to about C m h = W. Keys have no bias, which a softmax would cancel.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

from visionattn.errors import InputError, shorten

__all__ = ["ConditionTable", "ConditionalCrossAttention"]


@torch.fx.wrap
def _select(rows: list[torch.Tensor], conditions: torch.Tensor | None) -> torch.Tensor:
    table = torch.stack(rows)
    if conditions is None:
        return table
    if not torch.jit.is_scripting():
        _check_conditions(conditions)
    return table[conditions]


def _check_conditions(conditions: object) -> None:
    """Refuse other index types, such as an int or a mask, which would give rows of other shapes."""
    if isinstance(conditions, torch.Tensor):
        if conditions.ndim == 1 and conditions.dtype in (torch.int64, torch.int32):
            return
        given = f"{tuple(conditions.shape)} of {conditions.dtype}"
    else:
        given = shorten(repr(conditions))
    raise InputError(
        f"conditions must be an int64 tensor (C',), such as torch.tensor([2]), or None for all; got {given}."
    )


class ConditionTable(nn.Module):
    """Parameters of each condition: one parameter per condition, so that one can be trained alone.

    Args:
        num_conditions: Conditions C.
        shape: Shape of a condition's row.
        init: Fills a new row in place.

    Shape:
        conditions (C',), int64, or None for all -> (C', *shape).

    Raises:
        InputError: Fewer than one condition, or conditions that are not a tensor of that shape and dtype.
    """

    def __init__(
        self,
        num_conditions: int,
        shape: tuple[int, ...],
        init: Callable[[torch.Tensor], object],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_conditions < 1:
            raise InputError(f"num_conditions must be at least 1; got {num_conditions}.")
        self.init = init
        rows = [nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in range(num_conditions)]
        self.rows = nn.ParameterList(rows)
        for row in rows:
            init(row)

    @torch.jit.ignore
    def append(self, count: int = 1) -> list[nn.Parameter]:
        """Add rows at the end; the others stay unchanged.

        Returns:
            The new parameters: training only these leaves the results of other conditions unchanged.
        """
        new = [nn.Parameter(torch.empty_like(self.rows[0])) for _ in range(count)]
        for row in new:
            self.init(row)
            self.rows.append(row)
        return new

    def forward(self, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """Rows (C', *shape)."""
        # TorchScript does not support a list of a ParameterList.
        return _select([row for row in self.rows], conditions)


class _Reading(nn.Module):
    """Keys and values of one source of tokens, for queries that are mapped to the tokens' width."""

    def __init__(self, dim: int, width: int, num_heads: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = [num_heads, width // num_heads]
        self.norm = nn.LayerNorm(dim, **dd)
        self.key = nn.Linear(dim, width, bias=False, **dd)
        self.value = nn.Linear(dim, width, **dd)

    def lift(self, q: torch.Tensor) -> torch.Tensor:
        """Queries of each head, mapped to the tokens' width: (B, Q, W) -> (B, Q h, D)."""
        weight = self.key.weight.unflatten(0, self.heads)  # (h, d, D)
        return torch.einsum("bqhd,hde->bqhe", q.unflatten(-1, self.heads), weight).flatten(1, 2)

    def forward(self, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Queries (B or 1, Q, W) and tokens (B, N, D) -> (B, Q, W)."""
        x = self.norm(tokens).unsqueeze(1)  # (B, 1, N, D)
        u = self.lift(q).expand(tokens.shape[0], -1, -1).unsqueeze(1)
        y = F.scaled_dot_product_attention(u, x, x, scale=self.heads[1] ** -0.5).squeeze(1)  # (B, Q h, D)
        weight = self.value.weight.unflatten(0, self.heads)
        y = torch.einsum("bqhe,hde->bqhd", y.unflatten(1, (-1, self.heads[0])), weight)
        return y.flatten(2) + self.value.bias

    def attention(self, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Attention weights (B, Q, h, N) of `forward`."""
        scores = self.lift(q) @ self.norm(tokens).transpose(1, 2) * self.heads[1] ** -0.5
        return scores.softmax(-1).unflatten(1, (-1, self.heads[0]))


class _Block(nn.Module):
    """One of the K blocks: cross-attention to the tokens, then an MLP."""

    def __init__(
        self, dim: int, width: int, num_heads: int, mlp_ratio: float, context_dim: int | None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(width, **dd)
        self.query = nn.Linear(width, width, **dd)
        self.image = _Reading(dim, width, num_heads, **dd)
        self.context = None if context_dim is None else _Reading(context_dim, width, num_heads, **dd)
        self.proj = nn.Linear(width, width, **dd)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, int(width * mlp_ratio), **dd)

    def forward(
        self, z: torch.Tensor, tokens: torch.Tensor, context: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Conditions z (B or 1, Q, W) and tokens (B, N, D) -> (B, Q, W)."""
        q = self.query(self.norm1(z))
        y = self.image(q, tokens)
        if self.context is not None and context is not None:
            y = y + scale * self.context(q, context)
        z = z + self.proj(y)
        return z + self.mlp(self.norm2(z))


class ConditionalCrossAttention(nn.Module):
    """An embedding of an image for each condition (equations: see the module).

    Args:
        dim: Width D of the image's tokens.
        num_conditions: Conditions C of the table.
        embed_dim: Width E of an embedding.
        width: Width W of a condition; D if None.
        num_heads: Heads h. W must be divisible by it.
        num_tokens: Tokens m of a condition.
        depth: Blocks K.
        mlp_ratio: Hidden width of the MLPs as a multiple of W.
        vector_dim: Width of the vectors u_c, which an MLP maps to conditions. None: conditions are the table's rows.
        context_dim: Width D_R of the tokens of a second source; None for no second source.

    Shape:
        tokens (B, N, D), conditions (C',), int64, or None for all -> (B, C', E), of length 1.

    Raises:
        InputError: A size is less than 1, or the width is not divisible by the heads.
    """

    def __init__(
        self,
        dim: int,
        num_conditions: int,
        embed_dim: int = 128,
        width: int | None = None,
        num_heads: int = 4,
        num_tokens: int = 1,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        vector_dim: int | None = None,
        context_dim: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        width = dim if width is None else width
        if min(dim, embed_dim, width, num_heads, num_tokens, depth) < 1 or width % num_heads:
            raise InputError(
                f"Sizes must be at least 1 and width divisible by num_heads; got dim {dim}, embed_dim {embed_dim}, "
                f"width {width}, num_heads {num_heads}, num_tokens {num_tokens} and depth {depth}."
            )
        self.num_tokens = num_tokens
        shape = (num_tokens * width,) if vector_dim is None else (vector_dim,)
        # Small compared with what is read from the image, or all images would look alike at the start.
        self.table = ConditionTable(num_conditions, shape, partial(nn.init.normal_, std=0.02), **dd)
        mapped = vector_dim is not None
        self.embed = Mlp(vector_dim, width, num_tokens * width, **dd) if mapped else nn.Identity()
        self.blocks = nn.ModuleList([_Block(dim, width, num_heads, mlp_ratio, context_dim, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, **dd)
        self.proj = nn.Linear(num_tokens * width, embed_dim, **dd)

    @torch.jit.ignore
    def add_conditions(self, count: int = 1) -> list[nn.Parameter]:
        """Add conditions (see `ConditionTable.append`)."""
        return self.table.append(count)

    def queries(self, vectors: torch.Tensor) -> torch.Tensor:
        """The tokens e_c of conditions: (C', U) -> (1, C' m, W)."""
        return self.embed(vectors).unflatten(-1, (self.num_tokens, -1)).flatten(0, 1).unsqueeze(0)

    def forward_vectors(
        self, tokens: torch.Tensor, vectors: torch.Tensor, context: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        """Embed with conditions that need not be in the table.

        Args:
            tokens: (B, N, D).
            vectors: Conditions u_c, (C', vector_dim), or without it (C', m W) like the table's rows.
            context: Tokens of the second source, (B, M, D_R), or None.
            scale: Weight s of the second source.

        Returns:
            (B, C', E), of length 1.
        """
        z = self.queries(vectors)
        for block in self.blocks:
            z = block(z, tokens, context, scale)  # (B, C' m, W)
        z = self.norm(z).unflatten(1, (-1, self.num_tokens)).flatten(2)
        return F.normalize(self.proj(z), dim=-1)

    def forward(
        self,
        tokens: torch.Tensor,
        conditions: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """(B, N, D) -> (B, C', E) (arguments: see the class and `forward_vectors`)."""
        return self.forward_vectors(tokens, self.table(conditions), context, scale)

    @torch.jit.ignore
    def explain(self, tokens: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """Where a condition attends more than the mean condition.

        The map of a condition is the attention of the last block to the tokens, averaged over heads and tokens. It is
        divided by that of the mean of the table's rows: what every condition attends to, such as the centre, cancels.

        Args:
            tokens: (B, N, D).
            conditions: (C',), int64, or None for all.

        Returns:
            (B, C', N): 1 where both attend equally, above 1 where the condition attends more.
        """
        rows = self.table(None).mean(0, keepdim=True)
        z = self.queries(torch.cat([self.table(conditions), rows]))
        for block in self.blocks[:-1]:
            z = block(z, tokens, None, 0.0)
        last = self.blocks[-1]
        maps = last.image.attention(last.query(last.norm1(z)), tokens).mean(2)  # (B or 1, (C' + 1) m, N)
        maps = maps.unflatten(1, (-1, self.num_tokens)).mean(2)
        return maps[:, :-1] / maps[:, -1:].clamp(min=torch.finfo(maps.dtype).tiny)
