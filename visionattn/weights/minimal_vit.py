"""Weights of a read-out by efficient probing, without those of the frozen backbone that it was trained on."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from visionattn.weights.reading import read

__all__ = ["adapt"]

BACKBONE = Path(__file__).with_name("va_minimal_vit_micro_patch4_32.safetensors")
READ_OUT = {"attn_pool.queries", "attn_pool.value.weight", "head.weight", "head.bias"}


def adapt(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the shipped backbone to weights of a read-out alone; other weights stay as they are.

    Args:
        state: Weights of a file.
        wanted: State dict of the model that they are for.
    """
    if set(state) == READ_OUT and set(wanted) > READ_OUT:
        return {**read(BACKBONE), **state}
    return dict(state)
