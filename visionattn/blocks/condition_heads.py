r"""Baselines of conditional cross-attention: heads with the same interface, from tokens and conditions to embeddings.

Tokens X (B, N, D); x is their mean (B, D), or the first token if it is a class token.

    ConditionLinear              f_c = normalise(W_c x + b_c)                                     one linear head each
    ConditionalSimilarityMask    f_c = normalise((W x + b) * relu(m_c))                           CSN
    AttributeSpecificAttention   s_c = softmax over n of tanh(W_k X) tanh(W_a a_c) / sqrt(A)      ASEN: where, (B, N)
                                 x_c = sum over n of s_cn X_n                                     (B, D)
                                 g_c = sigmoid(W_2 relu(W_1 [x_c, relu(W_b a_c)]))                which channels, (B, D)
                                 f_c = normalise(W_E (g_c * x_c))

Sources: Conditional Similarity Networks, arXiv 1603.07810; Attribute-Specific Embedding Network, arXiv 2002.02814, in
its second form, that of ASEN++, arXiv 2104.02429.

Deviations, and why. Embeddings have length 1, as in training with cosines. CSN's penalties on masks and embeddings
belong to a loss. Entries of fixed masks that are one or zero are not trained.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionattn.blocks.conditional import ConditionTable
from visionattn.errors import InputError

__all__ = ["AttributeSpecificAttention", "ConditionLinear", "ConditionalSimilarityMask"]

MASKS = ("learned", "blocks", "fixed")


def _pool(tokens: torch.Tensor, class_token: bool) -> torch.Tensor:
    return tokens[:, 0] if class_token else tokens.mean(1)


class ConditionLinear(nn.Module):
    """One linear map per condition (equations: see the module).

    Args:
        dim: Width D of the tokens.
        num_conditions: Conditions C.
        embed_dim: Width E of an embedding.
        class_token: Read the first token instead of the mean.

    Shape:
        tokens (B, N, D), conditions (C',), int64, or None for all -> (B, C', E), of length 1.

    Raises:
        InputError: Fewer than one condition.
    """

    def __init__(
        self,
        dim: int,
        num_conditions: int,
        embed_dim: int = 128,
        class_token: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.class_token = class_token
        bound = dim**-0.5  # initialisation of nn.Linear
        # The last column is the bias.
        init = partial(nn.init.uniform_, a=-bound, b=bound)
        self.table = ConditionTable(num_conditions, (embed_dim, dim + 1), init, device=device, dtype=dtype)

    @torch.jit.ignore
    def add_conditions(self, count: int = 1) -> list[nn.Parameter]:
        """Add conditions (see `ConditionTable.append`)."""
        return self.table.append(count)

    def forward(self, tokens: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, C', E)."""
        weight = self.table(conditions)  # (C', E, D + 1)
        x = _pool(tokens, self.class_token)
        return F.normalize(torch.einsum("bd,ced->bce", x, weight[..., :-1]) + weight[..., -1], dim=-1)


class ConditionalSimilarityMask(nn.Module):
    """One embedding for all conditions, with a mask per condition (equations: see the module).

    Args:
        dim: Width D of the tokens.
        num_conditions: Conditions C.
        embed_dim: Width E of an embedding.
        masks: `"learned"` from N(0.9, 0.7); `"blocks"`, learned, initialised to 1 in a condition's block of E / C
            dimensions and 0.1 elsewhere; `"fixed"`, 1 in the block and 0 elsewhere.
        class_token: Read the first token instead of the mean.

    Shape:
        tokens (B, N, D), conditions (C',), int64, or None for all -> (B, C', E), of length 1.

    Raises:
        InputError: Unknown masks, fewer than one condition, or fewer dimensions than blocks.
    """

    def __init__(
        self,
        dim: int,
        num_conditions: int,
        embed_dim: int = 128,
        masks: str = "learned",
        class_token: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if masks not in MASKS:
            raise InputError(f"masks must be one of {', '.join(map(repr, MASKS))}; got {masks!r}.")
        if masks != "learned" and embed_dim < num_conditions:
            raise InputError(f"embed_dim ({embed_dim}) must be at least num_conditions ({num_conditions}).")
        self.masks = masks
        self.class_token = class_token
        self.proj = nn.Linear(dim, embed_dim, **dd)
        self.table = ConditionTable(num_conditions, (embed_dim,), partial(nn.init.normal_, mean=0.9, std=0.7), **dd)
        if masks != "learned":
            block = embed_dim // num_conditions
            for number, row in enumerate(self.table.rows):
                nn.init.constant_(row, 0.1 if masks == "blocks" else 0.0)
                nn.init.ones_(row.detach()[number * block : (number + 1) * block])
                row.requires_grad_(masks == "blocks")

    @torch.jit.ignore
    def add_conditions(self, count: int = 1) -> list[nn.Parameter]:
        """Add conditions (see `ConditionTable.append`).

        Raises:
            InputError: The masks are blocks, and no block is left.
        """
        if self.masks != "learned":
            raise InputError(f"With masks={self.masks!r} all dimensions are in use: use masks='learned'.")
        return self.table.append(count)

    def forward(self, tokens: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, C', E)."""
        x = self.proj(_pool(tokens, self.class_token))
        return F.normalize(x.unsqueeze(1) * self.table(conditions).relu(), dim=-1)


class AttributeSpecificAttention(nn.Module):
    """Attention over positions, then over channels, both by the condition (equations: see the module).

    Args:
        dim: Width D of the tokens.
        num_conditions: Conditions C.
        embed_dim: Width E of an embedding.
        width: Width A of a condition and of the comparison with positions.

    Shape:
        tokens (B, N, D), conditions (C',), int64, or None for all -> (B, C', E), of length 1.

    Raises:
        InputError: Fewer than one condition.
    """

    def __init__(
        self, dim: int, num_conditions: int, embed_dim: int = 128, width: int = 512, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.table = ConditionTable(num_conditions, (width,), nn.init.normal_, **dd)
        self.query = nn.Linear(width, width, **dd)  # W_a
        self.key = nn.Linear(dim, width, **dd)  # W_k, the authors' 1 x 1 convolution
        self.channel = nn.Linear(width, width, **dd)  # W_b
        self.fc1 = nn.Linear(dim + width, dim // 2, **dd)
        self.fc2 = nn.Linear(dim // 2, dim, **dd)
        self.proj = nn.Linear(dim, embed_dim, **dd)

    @torch.jit.ignore
    def add_conditions(self, count: int = 1) -> list[nn.Parameter]:
        """Add conditions (see `ConditionTable.append`)."""
        return self.table.append(count)

    def forward(self, tokens: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, C', E)."""
        a = self.table(conditions)  # (C', A)
        query, key = self.query(a).tanh().expand(tokens.shape[0], 1, -1, -1), self.key(tokens).tanh().unsqueeze(1)
        x = F.scaled_dot_product_attention(query, key, tokens.unsqueeze(1)).squeeze(1)  # (B, C', D)
        channel = self.channel(a).relu().expand(tokens.shape[0], -1, -1)
        gate = self.fc2(self.fc1(torch.cat([x, channel], -1)).relu()).sigmoid()
        return F.normalize(self.proj(gate * x), dim=-1)
