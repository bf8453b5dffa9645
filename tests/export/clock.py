"""A clock for tests of time limits: it advances by a second per pixel that a check computes."""

from __future__ import annotations

import functools

from visionattn.export import check, check_program, write
from visionattn.export.budget import Budget


class Clock:
    """Called, it returns its time in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def count_pixels(monkeypatch) -> Clock:
    """Let exports measure their time by a clock that advances by the pixels of a check's images."""
    clock, draw = Clock(), check.random_images

    def counted(spec, batch, size, seed):
        clock.seconds += batch * size[0] * size[1]
        return draw(spec, batch, size, seed)

    for module in (check, check_program):
        monkeypatch.setattr(module, "random_images", counted)
    monkeypatch.setattr(write, "Budget", functools.partial(Budget, clock=clock))
    return clock
