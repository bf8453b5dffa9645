"""Files of heads: safetensors whose metadata state what the head reads, and the names of its classes."""

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
from visionattn.probe.segmentation.heads import LinearSegmenter, create_segmenter
from visionattn.weights import mismatches

__all__ = ["load_head", "read_head", "save_head"]

_KEY = "visionattn_head"


def save_head(head: Head | LinearSegmenter, facts: Mapping[str, Any], path: Path) -> None:
    """Write a head, completely or not at all.

    Args:
        head: The head.
        facts: Metadata as plain values: `task` (default: classification), `pooling` (the name of a segmentation head),
            `layer` with `dim` and `grid`, `classes`, and further entries.
        path: The file.

    Raises:
        StorageError: The file could not be written.
    """
    with atomic_path(path) as temporary:
        # Writing bytes raises the system's error for a full disk.
        state = {key: value.contiguous() for key, value in head.state_dict().items()}
        temporary.write_bytes(save(state, {_KEY: json.dumps(facts, ensure_ascii=False)}))


def load_head(file: str | Path) -> Head | LinearSegmenter:
    """Open a head written by `visionattn probe`: pooling, batch norm and classifier, in evaluation mode.

    Its `forward` takes tokens (B, N, D) of the kind `tokens` and returns logits (B, K), or, as a head of segmentation,
    those of each token, (B, N, K).

    Args:
        file: A .safetensors file from the folder `heads` of a report.

    Raises:
        CheckpointError: The file does not exist, or is not a head.
    """
    return read_head(file)[0]


def read_head(file: str | Path) -> tuple[Head | LinearSegmenter, dict[str, Any]]:
    """Like `load_head`, but also returns the metadata of the head.

    Raises:
        CheckpointError: The file does not exist, or is not a head.
    """
    try:
        if not Path(file).is_file():
            raise CheckpointError(f"There is no file {shorten(file)}.")
        with safe_open(str(file), "pt") as content:
            facts = json.loads((content.metadata() or {})[_KEY])
            state: dict[str, Tensor] = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        with torch.device("meta"):  # wrong sizes in the metadata could require any amount of memory
            wrong = mismatches(state, _build(facts).state_dict())
        if wrong:
            raise ValueError("; ".join(wrong[:3]))
        with torch.random.fork_rng(devices=[]):
            head = _build(facts).to(state["classifier.weight"].dtype)
        head.load_state_dict(state)
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged file, or arbitrary metadata, can raise any error.
        raise CheckpointError(
            f"{shorten(file)} is not a head written by `visionattn probe`: {shorten(error)}"
        ) from error
    return head.eval(), facts


def _build(facts: Mapping[str, Any]) -> Head | LinearSegmenter:
    """The head that metadata describe, with initial weights."""
    layer, classes = facts["layer"], len(facts["classes"])
    if facts.get("task") == "segmentation":
        return create_segmenter(facts["pooling"], layer["dim"], classes)
    return Head(create_pooling(facts["pooling"], layer["dim"], tuple(layer["grid"])), classes)
