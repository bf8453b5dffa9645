"""Files of heads: safetensors whose metadata say what the head reads, and what its classes are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from visionattn.errors import CheckpointError, shorten
from visionattn.files import atomic_path
from visionattn.probe.heads.banks import Head
from visionattn.probe.heads.poolings import create_pooling
from visionattn.weights import mismatches

__all__ = ["load_head", "read_head", "save_head"]

_KEY = "visionattn_head"


def save_head(head: Head, facts: Mapping[str, Any], path: Path) -> None:
    """Write a head, whole or not at all.

    Args:
        head: The head.
        facts: Plain values: `pooling`, `layer` with `dim` and `grid`, `classes`, and what else shall be known.
        path: The file.

    Raises:
        StorageError: The file could not be written.
    """
    with atomic_path(path) as temporary:
        # Writing bytes gives the system's words for a full disk.
        state = {key: value.contiguous() for key, value in head.state_dict().items()}
        temporary.write_bytes(save(state, {_KEY: json.dumps(facts, ensure_ascii=False)}))


def load_head(file: str | Path) -> Head:
    """Open a head that `visionattn probe` wrote: pooling, batch norm and classifier, in evaluation.

    Its `forward` takes the tokens (B, N, D) that its `pooling.tokens` names and gives logits (B, K).

    Args:
        file: A .safetensors file of the folder `heads`.

    Raises:
        CheckpointError: There is no such file, or it is not a head.
    """
    return read_head(file)[0]


def read_head(file: str | Path) -> tuple[Head, dict[str, Any]]:
    """As `load_head`, with what the file says of the head.

    Raises:
        CheckpointError: There is no such file, or it is not a head.
    """
    try:
        if not Path(file).is_file():
            raise CheckpointError(f"There is no file {shorten(file)}.")
        with safe_open(str(file), "pt") as content:
            facts = json.loads((content.metadata() or {})[_KEY])
            state: dict[str, Tensor] = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        layer = facts["layer"]

        def build() -> Head:
            return Head(create_pooling(facts["pooling"], layer["dim"], tuple(layer["grid"])), len(facts["classes"]))

        with torch.device("meta"):  # sizes that the weights do not have would ask for any memory
            wrong = mismatches(state, build().state_dict())
        if wrong:
            raise ValueError("; ".join(wrong[:3]))
        with torch.random.fork_rng(devices=[]):
            head = build().to(state["classifier.weight"].dtype)
        head.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged file, and metadata that anybody can write, fail in any way.
        raise CheckpointError(
            f"{shorten(file)} is not a head that `visionattn probe` wrote: {shorten(error)}"
        ) from error
    return head.eval(), facts
