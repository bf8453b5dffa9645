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

from visionattn.errors import CheckpointError

__all__ = ["NAMES", "decode_names", "encode_names", "settings"]

NAMES = "attribute_names"
_MOST_BYTES = 2**20
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
    """Read names back.

    Raises:
        CheckpointError: They are damaged.
    """
    try:
        names = json.loads(bytes(encoded[:_MOST_BYTES].tolist()).decode())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (TypeError, ValueError, RecursionError):  # no bytes, no UTF-8, no JSON
        pass
    raise CheckpointError(f"The entry {NAMES} is damaged: it must hold a list of names.")


def settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the model that a state dict tells: attributes, head and width; none for that of another family.

    Raises:
        CheckpointError: It is of this family, but damaged.
    """
    if NAMES not in state:
        return {}
    head = next((kind for kind, key in HEADS.items() if key in state), None)
    width = state.get("head.table.rows.0" if head == "linear" else "head.proj.weight")
    if head is None or width is None or not width.ndim:
        raise CheckpointError("The weights look like a retrieval model's, but those of its head are missing.")
    return {"attributes": list(decode_names(state[NAMES])), "head": head, "embed_dim": width.shape[0]}
