"""Processes that share a probing run under torch.distributed; without it there is one process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch.distributed as dist

from visionattn.errors import VisionAttnError, require
from visionattn.files import exclusive
from visionattn.probe.settings import ProbeSettings

__all__ = ["in_processes", "one_writer", "rank_and_size", "together"]

T = TypeVar("T")


def in_processes(work: Callable[..., T], settings: ProbeSettings, *given: Any) -> T:
    """Call `work(settings, *given)` in one process for each device.

    Args:
        work: A function of a module; it is sent by its name.
        settings: Settings with the kind and the number of devices; each process gets its own device in them.
        *given: Further arguments, which are pickled.

    Returns:
        The result of the first process.

    Raises:
        VisionAttnError: The first process raised it.
    """
    fabric = require("lightning.fabric", "train").Fabric(
        accelerator="cuda" if settings.device.startswith("cuda") else "cpu",
        devices=settings.devices,
        strategy="ddp_spawn",
    )
    # Pickled here, since Lightning unpacks the arguments that it sends, and fails on frozen dataclasses.
    job = pickle.dumps((work, settings, given))
    with TemporaryDirectory(prefix="visionattn-") as folder:
        # Passed by file: Lightning's pipe is read after the processes have ended, and holds only 64 kB.
        answer = Path(folder) / "answer"
        fabric.launch(_do_job, job, str(answer))
        found = pickle.loads(answer.read_bytes())
    if isinstance(found, VisionAttnError):
        raise found
    return found


def _do_job(fabric: Any, job: bytes, answer: str) -> None:
    """Work of one of several processes; the first one writes its result, or its error, to a file."""
    work, settings, given = pickle.loads(job)
    try:
        found: Any = work(replace(settings, device=str(fabric.device)), *given)
    except VisionAttnError as error:  # if raised there, it would be reported as a stack trace
        found = error
    if rank_and_size()[0] == 0:
        Path(answer).write_bytes(pickle.dumps(found))


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
