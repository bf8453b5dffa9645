"""Process files one after the other: existing outputs are kept, a bad file costs one line, and a run can be resumed.

`upscale_files`, `stereo_files` and `flow_files` make `Job`s from their arguments and pass the function for a job to
`run`.
"""

from __future__ import annotations

import ctypes
import glob
import os
import stat
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from visionattn.data.images import SUFFIXES, is_hidden, list_images
from visionattn.errors import DataError, InputError, StorageError, VisionAttnError, shorten
from visionattn.files import check_output
from visionattn.predict.videos.video import VIDEOS
from visionattn.progress import draws_bars

__all__ = ["Bar", "Job", "Outcome", "files_of", "keep_freed_memory", "run", "target_folder"]

TAKEN = (*SUFFIXES, *VIDEOS)
# Images and videos in unsupported formats. They are reported as failed: skipping them would look like success.
UNREAD = {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".svg", ".eps", ".tga"}
UNREAD |= {".ico", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pbm", ".pnm"}
UNREAD |= {".apng", ".wmv", ".flv", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp", ".ogv", ".vob"}
UNREAD -= set(TAKEN)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LONGEST_PATH = 4096  # characters, Linux's limit
SILENCE = 30.0  # seconds between two lines of progress without a terminal


@dataclass(frozen=True)
class Job:
    """Files to read together, the file to write, and further files that are written next to it."""

    sources: tuple[Path, ...]
    target: Path
    also: tuple[Path, ...] = ()

    @property
    def source(self) -> Path:
        """The first file, which names the job in messages."""
        return self.sources[0]

    @property
    def is_video(self) -> bool:
        """Whether the files are videos, by their suffix."""
        return self.source.suffix.lower() in VIDEOS


@dataclass(frozen=True, repr=False)
class Outcome:
    """Outcome of the jobs.

    Attributes:
        written: Outputs that were written.
        skipped: Existing outputs that were kept, as requested.
        failed: Each failed input, with the reason in one line.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every output was written, or skipped as requested; otherwise 1."""
        return 1 if self.failed else 0

    def __repr__(self) -> str:
        return f"Outcome({len(self.written)} written, {len(self.skipped)} skipped, {len(self.failed)} failed)"


class Bar:
    """Progress of a job: a bar, or a line from time to time without a terminal.

    Args:
        progress: Display of the bar.
        task: Task of the job.
        name: Start of the lines of progress.
    """

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        self.progress = progress
        self.task = task
        self.name = name
        self.steps: int | None = None
        self.done = 0
        self.start = self.told = time.monotonic()

    def expect(self, steps: int | None) -> None:
        """Set the number of steps."""
        self.steps = steps
        self.progress.update(self.task, total=steps)

    def advance(self) -> None:
        """Count one finished step."""
        self.progress.advance(self.task)
        self.done += 1
        now = time.monotonic()
        if self.progress.disable and now - self.told >= SILENCE:
            self.told = now
            left = "" if not self.steps else f" of {self.steps}"
            if self.steps and self.steps >= self.done:
                seconds = (now - self.start) / self.done * (self.steps - self.done)
                left += f", about {max(seconds / 60, 1):.0f} min left"
            self.say(f"{self.name}: {self.done}{left}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.console.print(text)


def keep_freed_memory() -> None:
    """Let this process keep freed memory, if its C library is glibc.

    Otherwise large blocks are returned to the system at once, and each layer gets new ones page by page: SPAN with 48
    channels took 1.7 times as long on 512 x 512 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def files_of(given: str | Path, recursive: bool = False, without: Path | None = None) -> tuple[list[Path], bool]:
    """The images and videos that an argument names, in order, and whether it can name several.

    Other files of a folder are reported in one line. Unreadable images are included, so that `run` reports them.

    Args:
        given: A file, a folder or a pattern.
        recursive: Search the sub-folders of a folder too.
        without: A folder to exclude, such as that of the outputs.

    Raises:
        DataError: There are none.
    """
    text = os.fspath(given)
    if not text:  # an empty shell variable must not mean the working folder
        raise DataError("The name of an input is empty.")
    path, several = Path(text), True
    left_out = ""
    if path.is_dir():
        listing = list_images(path, recursive, (*TAKEN, *UNREAD))
        found = listing.files + listing.left_out.pop("unreadable", [])
        pipes = listing.left_out.get("not a regular file", [])
        found += [other for other in pipes if other.suffix.lower() in TAKEN]
        apart = None if without is None else os.path.realpath(without)
        if apart is not None and apart != os.path.realpath(path):
            found = [file for file in found if Path(apart) not in Path(os.path.realpath(file)).parents]
        found.sort()
        left_out = listing.describe_left_out()
    elif path.exists():
        found, several = [path], False
    elif glob.has_magic(text):
        names = sorted(glob.glob(text, recursive=True))
        found = [Path(name) for name in names if not os.path.isdir(name) and not is_hidden(Path(name))]
    else:
        raise DataError(f"There is no file or folder {shorten(text)}.")
    if not found:
        reason = f" Left out: {left_out}." if left_out else ""
        raise DataError(f"{shorten(text)} contains no image or video: {', '.join(TAKEN)} are supported.{reason}")
    if left_out:
        print(f"note: {shorten(text)}: left out {left_out}.")
    return found, several


def target_folder(output: str | Path, several: bool) -> tuple[Path, bool]:
    """Create the folder for results, check that it is writable, and return it and whether the argument names it.

    Raises:
        StorageError: The folder is not writable.
    """
    output = os.fspath(output)
    target = Path(output)
    try:
        if not output or "\0" in output:
            raise ValueError("a name must not be empty, and must not contain a null byte")
        is_folder = several or target.is_dir() or output.endswith("/") or not target.suffix
        folder = target if is_folder else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise StorageError(f"Cannot write into the folder {shorten(folder)}: it is a file, not a folder.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"Cannot write into the folder {shorten(output)}: {reason}.") from error
    return folder, is_folder


def run(
    jobs: list[Job],
    work: Callable[[Job, Bar, int], list[str]],
    writable: tuple[str, ...],
    *,
    overwrite: bool = False,
    skip_existing: bool = False,
) -> Outcome:
    """Do all jobs.

    Args:
        jobs: The jobs, in order.
        work: Does a job and returns notes for the user; its third argument is the number of remaining jobs. An error
            costs one line, and the other jobs are done.
        writable: Suffixes of outputs that are not videos.
        overwrite: Replace existing outputs.
        skip_existing: Keep existing outputs.
    """
    outcome = Outcome()
    written: set[str] = set()
    inputs = {os.path.realpath(path) for job in jobs for path in job.sources if "\0" not in str(path)}
    console = Console(highlight=False, markup=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),  # a file name may look like markup
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not draws_bars(console)) as progress:
        total = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        for number, job in enumerate(jobs):
            bar = Bar(progress, progress.add_task(shorten(job.source.name, 40), total=None), _shown(job.source))
            notes: list[str] = []
            try:
                _check_job(job, VIDEOS if job.is_video else writable, inputs)
                if job.target.exists() and skip_existing and not overwrite:
                    outcome.skipped.append(job.target)
                    told = f"skipped: {_shown(job.target)} exists"
                else:
                    _check_outputs(job, written, overwrite or skip_existing)
                    notes = work(job, bar, len(jobs) - number)
                    written |= {os.path.realpath(path) for path in (job.target, *job.also)}
                    outcome.written.append(job.target)
                    told = f"wrote {_shown(job.target)}"
            except Exception as error:
                # An unexpected error must not end the run either.
                outcome.failed.append((job.source, _reason(job, error)))
                told = f"failed: {outcome.failed[-1][1]}"
            finally:
                progress.remove_task(bar.task)
            for note in notes:
                console.print(f"note: {_shown(job.source)}: {note}.")
            console.print(told)
            progress.advance(total)
    if outcome.failed and len(jobs) > 1:
        console.print(
            f"{len(outcome.failed)} of {len(jobs)} failed: {', '.join(_shown(path) for path, _ in outcome.failed)}"
        )
    return outcome


def _shown(path: Path) -> str:
    """A path on one line; an existing path is not shortened, so that the line can be parsed."""
    return shorten(path, LONGEST_PATH)


def _reason(job: Job, error: Exception) -> str:
    """The reason of a failure, with the name of the file, in one line."""
    source = _shown(job.source)
    if isinstance(error, VisionAttnError):
        return shorten(error, 1000)
    if isinstance(error, MemoryError):
        return f"{source}: not enough memory for input and result."
    if isinstance(error, OSError) and error.strerror:
        return f"{source}: {shorten(error.filename or 'the system')}: {error.strerror}."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{source}: unexpected {type(error).__name__} at {where}, please report it: {shorten(error, 300)}"


def _check_job(job: Job, known: tuple[str, ...], inputs: set[str]) -> None:
    """Raise an error if a job cannot be done; `inputs` are the files of all jobs, with symbolic links resolved."""
    for path in job.sources:
        _check_source(path)
    source, target = _shown(job.source), _shown(job.target)
    if job.target.suffix.lower() not in known:
        raise InputError(f"{source}: cannot write {target}: its suffix is none of {', '.join(known)}.")
    for path in (job.target, *job.also):
        if os.path.realpath(path) in inputs:
            own = os.path.realpath(path) in {os.path.realpath(own) for own in job.sources}
            replaced = "the input" if own else f"another input, {_shown(path)}"
            raise InputError(f"{source}: the output would replace {replaced}. Choose another output.")


def _check_outputs(job: Job, written: set[str], replace: bool) -> None:
    """Raise an error if an output must be kept; `written` are the outputs so far, with symbolic links resolved."""
    source = _shown(job.source)
    for path in (job.target, *job.also):
        if os.path.realpath(path) in written:
            raise InputError(f"{source}: {_shown(path)} was written already, from another input of that name.")
        # Further files without their target are left over from an interrupted run.
        if path.is_file() and not replace:
            raise InputError(
                f"{source}: {_shown(path)} exists. Use --overwrite to replace it, or --skip-existing to keep it."
            )
        check_output(path, overwrite=True)


def _check_source(path: Path) -> None:
    """Raise `DataError` for files that cannot be read; opening a pipe would wait forever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"Could not read {_shown(path)}: {getattr(error, 'strerror', None) or error}.") from error
    if stat.S_ISDIR(mode):
        raise DataError(f"Could not read the folder {_shown(path)}: no permission.")
    if not stat.S_ISREG(mode):
        raise DataError(f"Could not read {_shown(path)}: it is not a regular file.")
    if path.suffix.lower() in UNREAD:
        raise DataError(
            f"Could not read {_shown(path)}: {path.suffix} files are not supported. Convert it to one of "
            f"{', '.join(TAKEN)}."
        )
