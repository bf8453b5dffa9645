"""Files one after the other: what exists stays, a bad file costs one line, a stopped run can go on.

A command makes `Job`s of its arguments and gives `run` what does one of them.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from visionattn.errors import DataError, InputError, StorageError, VisionAttnError
from visionattn.predict.picture import READABLE
from visionattn.predict.video import VIDEOS

__all__ = ["Bar", "Job", "add_arguments", "files_of", "keep_freed_memory", "run", "target_folder"]

TAKEN = (*READABLE, *VIDEOS)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Job:
    """Files to read together, and the file to write."""

    sources: tuple[Path, ...]
    target: Path

    @property
    def source(self) -> Path:
        """The first file, by which messages name the job."""
        return self.sources[0]

    @property
    def is_video(self) -> bool:
        """Whether the files are videos, by their suffix."""
        return self.source.suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Bar:
    """What a job shows of itself: a progress bar, and lines above it."""

    progress: Progress
    task: TaskID

    def expect(self, steps: int | None) -> None:
        """State how many steps there will be."""
        self.progress.update(self.task, total=steps)

    def advance(self) -> None:
        """One step is done."""
        self.progress.advance(self.task)

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.console.print(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument("--skip-existing", action="store_true", help="leave outputs that exist: resumes a stopped run")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    Large blocks otherwise go back to the system at once, and each layer gets new ones, page by page: SPAN of 48
    channels took 1.7 times as long on 512 x 512 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def files_of(text: str) -> tuple[list[Path], bool]:
    """The images and videos that an argument names, in order, and whether it may name several.

    Raises:
        DataError: There are none.
    """
    path, several = Path(text), True
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in TAKEN]
    elif path.exists():
        found, several = [path], False
    elif glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
    else:
        raise DataError(f"There is no file or folder {text}.")
    if not found:
        raise DataError(f"{text} holds no image or video: {', '.join(TAKEN)} are taken.")
    return found, several


def target_folder(output: str, several: bool) -> tuple[Path, bool]:
    """The folder that results go to, which is made and can be written to, and whether the argument names it itself.

    Raises:
        StorageError: Nothing can be written there.
    """
    target = Path(output)
    is_folder = several or target.is_dir() or output.endswith("/") or not target.suffix
    folder = target if is_folder else target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"Cannot write into the folder {folder}: {error.strerror or error}.") from error
    return folder, is_folder


def run(
    jobs: list[Job],
    work: Callable[[Job, Bar, int], list[str]],
    writable: tuple[str, ...],
    args: argparse.Namespace,
) -> int:
    """Do all jobs.

    Args:
        jobs: In order.
        work: Does a job and gives notes of what is worth knowing; its third argument says how many jobs are left.
        writable: Suffixes of outputs that are not videos.
        args: With those of `add_arguments`.

    Returns:
        0 when every output was written or skipped as asked, 1 when some were not.
    """
    failed: list[str] = []
    written: set[Path] = set()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        for number, job in enumerate(jobs):
            try:
                if _is_done(job, VIDEOS if job.is_video else writable, written, args):
                    console.print(f"skipped: {job.target} exists")
                else:
                    bar = Bar(progress, progress.add_task(job.source.name, total=None))
                    try:
                        notes = work(job, bar, len(jobs) - number)
                    finally:
                        progress.remove_task(bar.task)
                    written.add(job.target)
                    for note in notes:
                        console.print(f"note: {job.source}: {note}.")
                    console.print(f"wrote {job.target}")
            except VisionAttnError as error:
                failed.append(str(job.source))
                console.print(f"failed: {error}")
            except MemoryError:
                failed.append(str(job.source))
                console.print(f"failed: {job.source}: input and result do not fit the memory.")
            progress.advance(total)
    if failed and len(jobs) > 1:
        console.print(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def _is_done(job: Job, known: tuple[str, ...], written: set[Path], args: argparse.Namespace) -> bool:
    """Whether the result exists and shall stay; raises where it cannot be written."""
    if job.target.suffix.lower() not in known:
        raise InputError(f"{job.source}: cannot write {job.target}: its suffix is none of {', '.join(known)}.")
    if job.target.resolve() in (source.resolve() for source in job.sources):
        raise InputError(f"{job.source}: the output would replace the input: name another.")
    if job.target in written:
        raise InputError(f"{job.source}: {job.target} was written already, from another input of that name.")
    if not job.target.exists() or args.overwrite:
        return False
    if args.skip_existing:
        return True
    raise InputError(
        f"{job.source}: {job.target} exists: give --overwrite to replace it or --skip-existing to leave it."
    )
