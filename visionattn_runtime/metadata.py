"""Metadata of an exported file: the keys of `visionattn.export.spec` that are needed to run it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from visionattn_runtime.errors import RunError, short

__all__ = ["read_metadata"]

_NUMBER = (int, float)
_REQUIRED: dict[str, Any] = {
    "model": str,
    "task": str,
    "input_names": [str],
    "output_names": [str],
    "input_size": [int],
    "dynamic_axes": [str],
    "input_range": [_NUMBER],
}
_OPTIONAL: dict[str, Any] = {
    "batch": int,
    "size_multiple": int,
    "size_minimum": int,
    "scale": int,
    "radius": int,
    "input_layout": str,
    "output_kind": str,
    "mean": [_NUMBER],
    "std": [_NUMBER],
    "interpolation": str,
    "crop_pct": _NUMBER,
    "crop_mode": str,
    "labels": [str],
    "attributes": [str],
    "pair": str,
}
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
    "input_layout": ("NCHW", "NHWC"),
}
_LARGEST = 2**31


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read and check the metadata of a file.

    Args:
        metadata: Key-value strings of an ONNX file.

    Returns:
        Value of each key; None for optional keys that are missing.

    Raises:
        RunError: A required entry is missing, or an entry is invalid.
    """
    spec = {key: _entry(key, metadata.get(key), kind) for key, kind in {**_REQUIRED, **_OPTIONAL}.items()}
    missing = [key for key in _REQUIRED if spec[key] is None]
    if missing:
        raise RunError(f"its entry {missing[0]} is missing")
    counts = [*spec["input_size"], *(spec[key] for key in ("batch", "size_multiple", "size_minimum", "scale"))]
    if len(spec["input_size"]) != 3 or not all(1 <= count < _LARGEST for count in counts if count is not None):
        raise RunError("its sizes must be whole numbers of at least 1")
    if spec["radius"] is not None and not 0 <= spec["radius"] < _LARGEST:
        raise RunError("its radius must be at least 0")
    if not spec["input_names"] or not spec["output_names"]:
        raise RunError("it must name an input and an output")
    for key, count in (("input_range", 2), ("mean", spec["input_size"][0]), ("std", spec["input_size"][0])):
        values = spec[key]
        if values is not None and (len(values) != count or not all(abs(value) < _LARGEST for value in values)):
            raise RunError(f"its entry {key} must be {count} finite numbers")
    if spec["std"] is not None and min(spec["std"]) <= 0:
        raise RunError("its entry std must be above 0")
    if spec["crop_pct"] is not None and not 0 < spec["crop_pct"] <= 1:
        raise RunError("its entry crop_pct must be above 0 and at most 1")
    for key, choices in _CHOICES.items():
        if spec[key] is not None and spec[key] not in choices:
            raise RunError(f"its entry {key} must be one of {', '.join(choices)}; got {short(spec[key], 60)}")
    return spec


def _entry(key: str, text: str | None, kind: Any) -> Any:
    if text is None or kind is str:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"its entry {key} is not JSON: {short(text, 60)}") from error
    items, types = (value, kind[0]) if isinstance(kind, list) else ([value], kind)
    if not isinstance(items, list) or not all(isinstance(v, types) and not isinstance(v, bool) for v in items):
        raise RunError(f"its entry {key} has the wrong type: {short(text, 60)}")
    if types == _NUMBER and not all(math.isfinite(v) for v in items if isinstance(v, float)):
        raise RunError(f"its entry {key} is not finite")
    return value
