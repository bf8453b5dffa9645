"""Which calls a mixer supports (self-attention, cross-attention, prefix tokens, masks), determined by calling it.

Based on CAB, arXiv 2210.07661, which tests each of its modules for four patterns; causal ones do not apply here.
"""

from __future__ import annotations

import torch

from visionattn.arena.nets import create_mixer
from visionattn.errors import InputError

__all__ = ["PATTERNS", "has_pattern"]

PATTERNS = ("self", "cross", "prefix", "mask", "any grid")


def has_pattern(name: str, pattern: str) -> bool:
    """Whether a mixer supports a kind of call.

    Args:
        name: Name in `MIXERS`.
        pattern: One of `PATTERNS`.

    Raises:
        InputError: The pattern does not exist.
    """
    grid = (5, 3) if pattern == "any grid" else (4, 4)
    calls = {
        "self": {},
        "any grid": {},
        "prefix": {},
        "cross": {"context": torch.zeros(1, 3, 8)},
        "mask": {"mask": torch.ones(1, 16, dtype=torch.bool)},
    }
    if pattern not in calls:
        raise InputError(f"pattern must be one of {', '.join(map(repr, PATTERNS))}; got {pattern!r}.")
    mixer = create_mixer(name, 8, 2, (4, 4)).eval()
    x = torch.zeros(1, grid[0] * grid[1] + (pattern == "prefix"), 8)
    try:
        with torch.inference_mode():
            return mixer(x, grid, **calls[pattern]).shape == x.shape
    except InputError:
        return False
