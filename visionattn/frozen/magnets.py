"""RefAM's two rules for attention maps of conditions: magnets that absorb attention, and sinks that are removed.

A map of a condition is the attention of its tokens over an image's patches, averaged over late layers and heads.

    magnets    words without meaning of their own (".", "a", "with", a colour) are appended to the condition. They
               absorb attention that belongs to no word, and their columns are dropped together with those of stop words
    sinks      columns that are high for every row, of the condition and of the image, are dropped in late layers

Without text only the second rule applies: patches that all condition tokens attend to are not evidence for any of them.

Source: RefAM's project page; its code is not published. No gain of either rule was measured here: this package has no
text encoder, and conditional cross-attention, to whose condition maps they apply, is trained with its own conditions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from visionattn.errors import InputError, shorten
from visionattn.frozen.sinks import outliers

__all__ = ["append_magnets", "drop_tokens", "filter_sinks", "shared_sinks"]


def append_magnets(condition: Tensor, magnets: Tensor) -> tuple[Tensor, list[int]]:
    """Append magnets to the tokens of a condition.

    Args:
        condition: Tokens of the condition, (B, M, C).
        magnets: Embeddings of words without meaning, (K, C).

    Returns:
        The extended condition (B, M + K, C), and the indices of the magnets, which are to be dropped from its maps.
    """
    if condition.ndim != 3 or magnets.ndim != 2 or condition.shape[2] != magnets.shape[1]:
        raise InputError(
            f"magnets (K, C) must have the width C of the condition (B, M, C); got {shorten(tuple(magnets.shape))} and "
            f"{tuple(condition.shape)}."
        )
    count = condition.shape[1]
    longer = torch.cat([condition, magnets.to(condition).expand(len(condition), -1, -1)], dim=1)
    return longer, list(range(count, count + len(magnets)))


def drop_tokens(weights: Tensor, dropped: Collection[int]) -> Tensor:
    """Set the columns of magnets and stop words to 0, and rescale each row to sum to 1.

    Args:
        weights: Attention of patches on the condition, (..., N, M).
        dropped: Indices of the columns.

    Returns:
        (..., N, M), with zeros in the dropped columns; a row without other attention is 0.

    Raises:
        InputError: A column does not exist, or none would be left.
    """
    count = weights.shape[-1]
    if any(not 0 <= index < count for index in dropped) or len(set(dropped)) >= count:
        raise InputError(
            f"dropped must contain columns from 0 to {count - 1}, but not all of them; got {shorten(sorted(dropped))}."
        )
    kept = torch.ones(count, dtype=torch.bool, device=weights.device)
    kept[list(dropped)] = False
    left = weights * kept
    total = left.sum(dim=-1, keepdim=True)
    return left / torch.where(total > 0, total, 1.0)


def shared_sinks(maps: Tensor) -> Tensor:
    """Patches that are outliers in the map of every token of the condition: (..., M, N) -> bool (..., N)."""
    return outliers(maps).all(dim=-2)


def filter_sinks(maps: Tensor) -> Tensor:
    """Set patches that every token of a condition attends to to 0 in its maps, and keep the sum of each map.

    Args:
        maps: Attention of the condition's tokens over the patches, (..., M, N).

    Returns:
        (..., M, N). A map that lies on sinks only is unchanged.
    """
    left = maps.masked_fill(shared_sinks(maps)[..., None, :], 0.0)
    total = left.sum(dim=-1, keepdim=True)
    scaled = left * maps.sum(dim=-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, scaled, maps)
