"""Types of command-line arguments: numbers that are finite and in a range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from visionattn.errors import shorten

__all__ = ["number", "whole_number"]


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of a finite number from `low` to `high`, for `add_argument(..., type=number(0, 1))`.

    Args:
        low: The least.
        high: The largest.
        above: Leave out `low` itself.
    """
    wanted = "a finite number"
    if low > -math.inf:
        wanted += f" above {low:g}" if above else f" of at least {low:g}"
    if high < math.inf:
        wanted += f"{' and' if low > -math.inf else ' of'} at most {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {wanted}; got {shorten(text)!r}")
        return value

    return parse


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a whole number from `low` to `high`.

    Args:
        low: The least.
        high: The largest; None is no bound.
    """
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}; got {shorten(text)!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {wanted}; got {shorten(text)!r}")
        return value

    return parse
