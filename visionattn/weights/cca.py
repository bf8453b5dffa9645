"""Weights of attribute retrieval: arguments of the model that a state dict belongs to.

There is one layout, ours. It stores the names of the attributes, the meaning of the table's rows, as a JSON list in
UTF-8.
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
# A weight that identifies each head.
HEADS = {
    "cca": "head.blocks.0.query.weight",
    "asen": "head.fc1.weight",
    "csn": "head.proj.weight",
    "linear": "head.table.rows.0",
}


def encode_names(names: Sequence[str]) -> Tensor:
    """Encode names as bytes, uint8 (n,)."""
    return torch.tensor(list(json.dumps(list(names), ensure_ascii=False).encode()), dtype=torch.uint8)


def decode_names(encoded: Tensor) -> tuple[str, ...]:
    """Decode names from the bytes of `encode_names`.

    Raises:
        CheckpointError: The bytes are damaged.
    """
    try:
        names = json.loads(bytes(encoded[:_MOST_BYTES].tolist()).decode())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (TypeError, ValueError, RecursionError):  # not bytes, not UTF-8, not JSON
        pass
    raise CheckpointError(f"The entry {NAMES} is damaged: it must hold a list of names.")


def settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive the arguments of the model from a state dict: attributes, head and width; empty for another family.

    Raises:
        CheckpointError: The state dict is of this family, but damaged.
    """
    if NAMES not in state:
        return {}
    head = next((kind for kind, key in HEADS.items() if key in state), None)
    width = state.get("head.table.rows.0" if head == "linear" else "head.proj.weight")
    if head is None or width is None or not width.ndim:
        raise CheckpointError("The weights look like a retrieval model's, but those of its head are missing.")
    return {"attributes": list(decode_names(state[NAMES])), "head": head, "embed_dim": width.shape[0]}
