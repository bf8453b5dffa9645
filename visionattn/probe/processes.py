"""The processes that divide a probing run, under torch.distributed; without it there is one."""

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
    """Give the number of this process, from 0, and how many there are; 0 and 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do this process's share, and wait for the others.

    Args:
        work: Gives something that can be pickled.
        group: The processes; the default group if None.

    Returns:
        What all processes found, in their order.

    Raises:
        VisionAttnError: The work of a process raised it; all processes raise it then, so that none waits for ever.
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
    """Hold a folder for this run, whose first process takes the lock.

    Raises:
        StorageError: Another run writes to it, or nothing can be written there.
    """
    with ExitStack() as stack:

        def enter() -> None:
            if rank_and_size()[0] == 0:
                stack.enter_context(exclusive(folder))

        together(enter)
        yield
