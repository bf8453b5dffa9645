"""The time limit of an export: one amount of CPU time for all of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from visionattn.errors import InputError

__all__ = ["TIME_LIMIT", "Budget", "TimeLimitError"]

TIME_LIMIT = 900.0  # seconds of CPU time

EVERY = 10.0  # seconds between lines about a long step


class TimeLimitError(Exception):
    """A step has exceeded the time limit, or would."""


class Budget:
    """CPU time, of all threads together, that has passed since this object was made, and its limit.

    Args:
        limit: Seconds of CPU time. Default: none.
        tell: Called with lines about the progress.
        clock: Returns the CPU time in seconds.

    Raises:
        InputError: The limit is not above 0.
    """

    def __init__(
        self,
        limit: float = math.inf,
        tell: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        if not isinstance(limit, (int, float)) or not limit > 0:
            raise InputError(f"time_limit must be a number of seconds above 0; got {limit!r}.")
        self.limit = limit
        self.tell = tell or (lambda line: None)
        self._clock, self._start = clock, clock()
        self._told = -EVERY

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._clock() - self._start

    def allows(self, seconds: float) -> bool:
        """Whether a step of that duration would end within the limit."""
        return self.spent + seconds <= self.limit

    def check(self, step: str) -> None:
        """Stop a step that has passed the limit.

        Raises:
            TimeLimitError: It has; the message names the step and the remedy.
        """
        if not self.allows(0):
            raise TimeLimitError(
                f"{step} did not end within the limit of {self.limit:,.10g} s of CPU time for all steps; raise it with "
                "--time-limit (time_limit=)."
            )

    def tell_time(self, what: str, always: bool) -> None:
        """Tell what begins and the time so far, unless the last such line was only just written."""
        spent = self.spent
        if always or spent - self._told >= EVERY:
            self._told = spent
            limit = f" of at most {self.limit:,.10g} s" if self.limit < math.inf else ""
            self.tell(f"{what}: {spent:,.0f} s{limit} of CPU time so far.")
