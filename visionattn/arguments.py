"""Command-line arguments: bounded finite numbers, and old spellings of options."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from visionattn.errors import shorten

__all__ = ["add_old_spelling", "call_with", "number", "whole_number"]

Result = TypeVar("Result")


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of a finite number from `low` to `high`, for `add_argument(..., type=number(0, 1))`.

    Args:
        low: The minimum.
        high: The maximum.
        above: Exclude `low` itself.
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
        low: The minimum.
        high: The maximum; None for no bound.
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


def add_old_spelling(
    parser: argparse.ArgumentParser, old: str, new: str, values: Mapping[str, str] | None = None
) -> None:
    """Accept the old spelling of an option, and print a note with the new one.

    Args:
        parser: The parser, which has the option `new`.
        old: Such as "--input-size". The help does not show it.
        new: Such as "--image-size".
        values: Old values of the option -> new ones.
    """
    now: Any = parser._option_string_actions[new]
    choices = now.choices and [*(values or {}), *now.choices]
    parser.add_argument(
        old,
        action=_OldSpelling,
        dest=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        nargs=now.nargs,
        type=now.type,
        choices=choices,
        now=now,
        values=values or {},
    )


def call_with(function: Callable[..., Result], args: argparse.Namespace) -> Result:
    """Call a function with the parsed arguments that have the names of its parameters; each must have one."""
    return function(**{name: getattr(args, name) for name in inspect.signature(function).parameters})


class _OldSpelling(argparse.Action):
    def __init__(self, *args: Any, now: argparse.Action, values: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.now = now
        self.values_now = values

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        given = self.values_now.get(values, values) if isinstance(values, str) else values
        value = f" {given}" if given != values else ""
        print(f"visionattn: note: {option} is now {self.now.option_strings[0]}{value}.", file=sys.stderr)
        self.now.required = False  # its value is set
        self.now(parser, namespace, given, option)
