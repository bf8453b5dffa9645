"""Sizes at which an exported file is traced and checked."""

from __future__ import annotations

import math

from visionattn.export.spec import ExportSpec

__all__ = ["check_sizes", "program_sizes", "scaled_size"]


def scaled_size(size: int, factor: float, spec: ExportSpec) -> int:
    """An accepted size near `factor * size`: a prime if any size is accepted, since no window or patch divides it."""
    size = max(round(factor * size), spec.size_minimum or 1, 2)
    if spec.size_multiple > 1:
        return spec.size_multiple * math.ceil(size / spec.size_multiple)
    while any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        size += 1
    return size


def check_sizes(spec: ExportSpec) -> list[tuple[int, int]]:
    """The sizes at which a file is checked: its own and, if it is dynamic, two very different ones.

    One is taller than wide and, if any size is accepted, not a multiple of any window; the other is the stated
    minimum, or wider than tall if none is stated.
    """
    own, *others = program_sizes(spec)
    minimum = spec.size_minimum or min(own)
    return [own, others[0], (minimum, minimum)] if others and minimum < min(own) else [own, *others]


def program_sizes(spec: ExportSpec) -> list[tuple[int, int]]:
    """Like `check_sizes` without the minimum: a program of torch.export fails if an inner axis becomes 1."""
    height, width = spec.input_size[1:]
    factors = ((1.6, 0.6), (0.6, 1.6)) if spec.dynamic_size else ()
    return [(height, width), *((scaled_size(height, y, spec), scaled_size(width, x, spec)) for y, x in factors)]
