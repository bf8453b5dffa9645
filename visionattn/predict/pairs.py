"""Shared code of `stereo_files` and `flow_files`: pairs of files, their jobs, additional outputs, and videos."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from visionattn.errors import DataError, InputError, shorten
from visionattn.predict import batch
from visionattn.predict.batch import Bar, Job
from visionattn.predict.images.picture import Picture, read, write
from visionattn.predict.videos.video import VIDEOS, convert_videos, probe

__all__ = [
    "Found",
    "beside",
    "consecutive",
    "convert_pair",
    "image_beside",
    "jobs_of",
    "naming",
    "pair_up",
    "read_pair",
]

Found = tuple[Sequence[tuple[Path, ...]], bool]
"""Files that belong together, and whether there may be several of them."""


def pair_up(first: str | Path, second: str | Path, output: str | Path | None = None) -> tuple[Found, list[Path]]:
    """Pair two files, or the files of two folders or patterns by their names.

    Subfolders are included. Files of patterns are paired by their names or, if these are not unique, by the folders
    that `*` matches: "*/im0.png" and "*/im1.png".

    Args:
        first: File, folder or pattern.
        second: File, folder or pattern.
        output: The output, whose folder is excluded from the inputs.

    Returns:
        The pairs of files, and the name of each without a suffix.

    Raises:
        DataError: There are no files, some have no partner, or two have the same name except for the suffix.
    """
    without = None if output is None else Path(output)
    (ones, several), (others, _) = (batch.files_of(given, True, without) for given in (first, second))
    whole = any(len({path.stem for path in files}) < len(files) for files in (ones, others))
    names = [_name(first, path, whole) for path in ones]
    if len(ones) == len(others) == 1:
        return ([(ones[0], others[0])], several), names
    by_name: dict[Path, Path] = {}
    for path in others:
        if (same := by_name.setdefault(_name(second, path, whole), path)) is not path:
            raise DataError(
                f"{shorten(same)} and {shorten(path)} have the same name, so the pair is ambiguous: rename one."
            )
    if missing := [shorten(path.name, 40) for path, name in zip(ones, names) if name not in by_name]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{shorten(second)} has no images with the names of {', '.join(missing[:3])}{more}: names must match."
        )
    if unused := len(by_name.keys() - set(names)):
        print(f"note: {shorten(second)}: left out {unused} without a partner in {shorten(first)}.")
    return ([(path, by_name[name]) for path, name in zip(ones, names)], several), names


def _name(given: str | Path, path: Path, whole: bool) -> Path:
    """The name of a file of a folder or pattern, without a suffix; with `whole`, including the folders of a pattern."""
    if os.path.isdir(given):
        return path.relative_to(given).with_suffix("")
    parts = Path(given).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if not whole or fixed == len(parts):
        return Path(path.stem)
    inside = Path(*path.parts[fixed:])
    return inside.with_suffix("") if glob.has_magic(parts[-1]) else inside.parent


def consecutive(source: str | Path) -> Found:
    """One video, or the images of a folder or pattern, each with the next one.

    Raises:
        DataError: There are no files, or a single image.
    """
    files, several = batch.files_of(source)
    files.sort(key=_frame_order)
    if len(files) == 1:
        if files[0].suffix.lower() not in VIDEOS:
            raise DataError(f"{shorten(source)} is one image; flow requires two images, a video or a folder of frames.")
        return [(files[0],)], several
    return [*pairwise(files)], True


def _frame_order(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value: frame_9 comes before frame_10."""
    return [
        (int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name, flags=re.ASCII)
    ]


def jobs_of(
    found: Found,
    output: str | Path,
    form: str | None,
    default: str,
    also: Callable[[Path], list[Path]],
    names: Sequence[Path] = (),
) -> list[Job]:
    """The jobs of files that belong together.

    Args:
        found: The files.
        output: File or folder.
        form: Suffix of what is written into a folder, without its dot; videos keep their names.
        default: Suffix where no form is given.
        also: Returns the additional files written next to an output.
        names: Name of each without a suffix. Default: the names of the first files.

    Raises:
        InputError: A format is given for an output whose suffix determines it.
        StorageError: The output cannot be written.
    """
    files, several = found
    folder, named = batch.target_folder(output, several)
    if form and not named:
        raise InputError(f"The suffix of {output} determines the format: leave out --format, which is for folders.")
    suffix = f".{form}" if form else default
    jobs = []
    for sources, name in zip(files, names or [Path(sources[0].stem) for sources in files]):
        job = Job(sources, Path(output))
        if named:
            own = sources[0].suffix if job.is_video else suffix
            job = Job(sources, folder / name.with_name(name.name + own))
        jobs.append(job if job.is_video else Job(sources, job.target, tuple(also(job.target))))
    return jobs


def image_beside(target: Path, name: str) -> Path:
    """Path of an image next to an output."""
    return target.with_name(f"{target.stem}_{name}.png")


@contextmanager
def naming(job: Job) -> Iterator[None]:
    """Prefix errors with the name of the job."""
    try:
        yield
    except InputError as error:
        if str(job.source) in str(error):
            raise
        raise InputError(f"{job.source}: {error}") from error


def read_pair(job: Job) -> tuple[Picture, Picture]:
    """Both images of a job.

    Raises:
        DataError: One is damaged, or not an image.
        InputError: They have different sizes.
    """
    first, second = (read(path) for path in job.sources)
    _check_sizes(job, [picture.pixels.shape[:2] for picture in (first, second)])
    return first, second


def convert_pair(job: Job, bar: Bar, convert: Callable[..., np.ndarray | None]) -> None:
    """Convert the job's videos (see `convert_videos`) to a video of the same size."""
    videos = [probe(source) for source in job.sources]
    sizes = [(video.height, video.width) for video in videos]
    _check_sizes(job, sizes)
    for note in convert_videos(job.sources, job.target, convert, sizes[0], bar.advance, bar.expect):
        bar.say(f"note: {job.source}: {note}.")


def _check_sizes(job: Job, sizes: Sequence[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        stated = " and ".join(f"{path} is {h} x {w}" for path, (h, w) in zip(job.sources, sizes))
        raise InputError(f"{stated}; both must have the same size. Crop or resize one of them.")


def beside(target: Path, name: str, pixels: np.ndarray) -> None:
    """Write a uint8 image (H, W) or (H, W, 3) next to the output, as NAME_name.png."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    write(image_beside(target, name), Picture(pixels))
