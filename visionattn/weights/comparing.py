"""Comparing the weights of a file with those of a model: names, shapes, types and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from visionattn.errors import CheckpointError, shorten

__all__ = ["check_values", "count_bytes", "mismatches", "name_some"]

COUNTER = ".num_batches_tracked"


def count_bytes(state: Mapping[str, Tensor]) -> int:
    """Memory of the tensors in bytes, each storage counted once."""
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}.values()
    )


def name_some(lines: list[str]) -> str:
    """Join the first three lines, and state how many more there are."""
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(shorten(line) for line in lines[:3]) + more


def mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Describe each weight that is missing, unknown, of another shape, or integer instead of floating point.

    Counters of batch norms may be missing, as in timm: evaluation does not use them.
    """
    lines = [f"{key} is missing" for key in wanted if key not in found and not key.endswith(COUNTER)]
    lines += [f"{key} is unknown" for key in found if key not in wanted]
    for key in wanted:
        if key not in found:
            continue
        if found[key].shape != wanted[key].shape:
            lines.append(f"{key} is {tuple(found[key].shape)}, not {tuple(wanted[key].shape)}")
        elif found[key].is_floating_point() != wanted[key].is_floating_point():
            types = (str(tensor.dtype).removeprefix("torch.") for tensor in (found[key], wanted[key]))
            lines.append("{} is {}, not {}".format(key, *types))
    return lines


def check_values(found: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path) -> None:
    """Check that weights are finite.

    Args:
        found: Weights of a file.
        own: Weights of a new model; buffers that are infinite there may be infinite in the file too.
        source: Name of the file, for the message.

    Raises:
        CheckpointError: Some weights are NaN or infinite.
    """
    wrong = [
        key
        for key, value in found.items()
        if value.is_floating_point()
        and not value.isfinite().all()
        and not (key in own and own[key].device.type != "meta" and not own[key].isfinite().all())
    ]
    if wrong:
        raise CheckpointError(
            f"{shorten(source)} holds NaN or infinite values, as after diverged training: {name_some(wrong)}. Use an "
            "earlier checkpoint."
        )
