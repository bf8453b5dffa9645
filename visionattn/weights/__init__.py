"""Checkpoint layouts, published and ours, as pure functions on state dicts, one file per family; shipped weights."""

from pathlib import Path

from visionattn.weights.comparing import check_values, count_bytes, mismatches, name_some
from visionattn.weights.reading import check_archive, read, unwrap

__all__ = ["SHIPPED", "check_archive", "check_values", "count_bytes", "mismatches", "name_some", "read", "unwrap"]

SHIPPED = Path(__file__).parent
"""Folder of the weights in the package, NAME.safetensors, each with a card NAME.md."""
