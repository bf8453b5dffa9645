"""Processes that share a probing run under torch.distributed; without it there is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from visionattn.errors import VisionAttnError
from visionattn.files import exclusive

__all__ = ["one_writer", "rank_and_size", "together"]

T = TypeVar("T")


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes; 0 and 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do this process's share of the work, and wait for the others.

    Args:
        work: Returns something that can be pickled.
        group: The processes; None: the default group.

    Returns:
        The results of all processes, in the order of their ranks.

    Raises:
        VisionAttnError: The work of a process raised it; then all processes raise it, so that none waits forever.
    """
    found: tuple[T | None, VisionAttnError | None]
    try:
        found = work(), None
    except VisionAttnError as error:
        found = None, error
    processes = rank_and_size(group)[1]
    everything: list[Any] = [found]
    if processes > 1:
        everything = [None] * processes
        dist.all_gather_object(everything, found, group=group)
    for _, raised in everything:
        if raised is not None:
            raise raised
    return [result for result, _ in everything]


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for this run; the first process takes the lock.

    Raises:
        StorageError: Another run is writing to it, or it is not writable.
    """
    with ExitStack() as stack:

        def enter() -> None:
            if rank_and_size()[0] == 0:
                stack.enter_context(exclusive(folder))

        together(enter)
        yield
