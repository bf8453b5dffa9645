"""Weights of attribute retrieval: what a state dict says of the model that it belongs to.

There is one layout, ours. The names of the attributes stand in it as UTF-8 of their JSON list, since what a row of the
table means is no number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMES", "decode_names", "encode_names", "settings"]

NAMES = "attribute_names"
# A weight that no other head has.
HEADS = {
    "cca": "head.blocks.0.query.weight",
    "asen": "head.fc1.weight",
    "csn": "head.proj.weight",
    "linear": "head.table.rows.0",
}


def encode_names(names: Sequence[str]) -> Tensor:
    """Write names as bytes, uint8 (n,)."""
    return torch.tensor(list(json.dumps(list(names), ensure_ascii=False).encode()), dtype=torch.uint8)


def decode_names(encoded: Tensor) -> tuple[str, ...]:
    """Read names back."""
    return tuple(json.loads(bytes(encoded.tolist()).decode()))


def settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the model that a state dict tells: attributes, head and width; none for that of another family."""
    if NAMES not in state:
        return {}
    head = next(kind for kind, key in HEADS.items() if key in state)
    embed_dim = state["head.table.rows.0" if head == "linear" else "head.proj.weight"].shape[0]
    return {"attributes": list(decode_names(state[NAMES])), "head": head, "embed_dim": embed_dim}
