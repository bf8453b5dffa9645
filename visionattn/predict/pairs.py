"""What `visionattn stereo` and `visionattn flow` share: their arguments, pairs of files, the model, the loop."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from visionattn.arguments import number, whole_number
from visionattn.errors import DataError, InputError, shorten
from visionattn.models.enlarged import LARGEST
from visionattn.opening import open_model
from visionattn.predict import batch
from visionattn.predict.batch import Bar, Job
from visionattn.predict.images.picture import Picture, read, write
from visionattn.predict.matching import Matcher
from visionattn.predict.network import PRECISIONS
from visionattn.predict.videos.video import VIDEOS, convert_videos, probe

__all__ = [
    "add_arguments",
    "beside",
    "cloud_file",
    "consecutive",
    "convert_pair",
    "depth_file",
    "naming",
    "open_matcher",
    "pair_up",
    "read_pair",
]


def add_arguments(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    """Add the arguments that both commands have; `formats` are suffixes, the first one being the default."""
    names = [suffix[1:] for suffix in formats]
    parser.add_argument("--model", metavar="NAME|FILE", help="name of the zoo, or weight file")
    parser.add_argument("--checkpoint", metavar="FILE", help="weight file of the model named, where it says too little")
    parser.add_argument("--format", choices=names, help=f"of the files in a folder (default: {names[0]})")
    parser.add_argument("--color", "--colour", action="store_true", help="also write NAME_color.png, for the eye")
    parser.add_argument("--nonocc", action="store_true", help="also write NAME_nonocc.png: white where both see it")
    batch.add_arguments(parser)
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: fp16 on a GPU")
    parser.add_argument(
        "--max-pixels",
        type=whole_number(0),
        metavar="N",
        help="larger images are reduced to N (default: by the free memory)",
    )
    parser.add_argument(
        "--low-resolution-start", action="store_true", help="start from half the size: for images of 2K and more"
    )
    parser.add_argument(
        "--enlarge",
        type=number(1, LARGEST),
        default=1.0,
        metavar="S",
        help="match images S times as large: finer, slower",
    )


def pair_up(first: str, second: str, args: argparse.Namespace, default: str) -> list[Job]:
    """The jobs of two files, or of two folders or patterns, whose files belong together by their names.

    Args:
        first: File, folder or pattern.
        second: Likewise.
        args: With `output` and `format`.
        default: Suffix of what is written into a folder where no format is given; videos keep their names.

    Raises:
        DataError: There are no files, some lack their other one, or two have the same name but for the suffix.
        InputError: There is a format beside an output whose suffix says it.
        StorageError: Nothing can be written to the output.
    """
    (ones, several), (others, _) = batch.files_of(first), batch.files_of(second)
    found: list[tuple[Path, ...]]
    if len(ones) == len(others) == 1:
        found = [(ones[0], others[0])]
    else:
        by_name: dict[str, Path] = {}
        for path in others:
            if (same := by_name.setdefault(path.stem, path)) is not path:
                raise DataError(f"{shorten(same)} and {shorten(path)} have one name: which is meant does not show.")
        if missing := [shorten(path.name, 40) for path in ones if path.stem not in by_name]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"{shorten(second)} lacks the other images of {', '.join(missing[:3])}{more}: names must be equal."
            )
        found = [(path, by_name[path.stem]) for path in ones]
        if unused := len(by_name.keys() - {path.stem for path in ones}):
            print(f"note: {shorten(second)}: {unused} without another image in {shorten(first)} left out.")
    return _jobs(found, several, args, default)


def consecutive(source: str, args: argparse.Namespace, default: str) -> list[Job]:
    """The jobs of one video, or of a folder or pattern of images, each with the next one (arguments: see `pair_up`).

    Raises:
        DataError: There are no files, or a single image.
        InputError: There is a format beside an output whose suffix says it.
        StorageError: Nothing can be written to the output.
    """
    files, several = batch.files_of(source)
    files.sort(key=_frame_order)
    if len(files) == 1:
        if files[0].suffix.lower() not in VIDEOS:
            raise DataError(
                f"{shorten(source)} is one image; flow is between two images, or along a video or a folder."
            )
        return _jobs([(files[0],)], several, args, default)
    return _jobs([*pairwise(files)], True, args, default)


def _frame_order(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value: frame_9 comes before frame_10."""
    return [
        (int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name, flags=re.ASCII)
    ]


def _jobs(found: Sequence[tuple[Path, ...]], several: bool, args: argparse.Namespace, default: str) -> list[Job]:
    folder, named = batch.target_folder(args.output, several)
    if not named:
        if args.format:
            raise InputError(f"The suffix of {args.output} says the format: leave out --format, which is for folders.")
        return [_job(sources, Path(args.output), args) for sources in found]
    form = f".{args.format}" if args.format else default
    names = [source.name if source.suffix.lower() in VIDEOS else source.stem + form for source, *_ in found]
    return [_job(sources, folder / name, args) for sources, name in zip(found, names)]


def _job(sources: tuple[Path, ...], target: Path, args: argparse.Namespace) -> Job:
    """A job with all that it writes."""
    if sources[0].suffix.lower() in VIDEOS:
        return Job(sources, target)
    also = [image_beside(target, name) for name in ("color", "nonocc") if getattr(args, name)]
    if getattr(args, "focal", None):
        also.append(depth_file(target))
    if getattr(args, "ply", False):
        also.append(cloud_file(target))
    return Job(sources, target, tuple(also))


def image_beside(target: Path, name: str) -> Path:
    """Where a picture next to an output stands."""
    return target.with_name(f"{target.stem}_{name}.png")


def depth_file(target: Path) -> Path:
    """Where the depth next to a disparity stands."""
    return target.with_stem(f"{target.stem}_depth")


def cloud_file(target: Path) -> Path:
    """Where the point cloud next to a disparity stands."""
    return target.with_suffix(".ply")


def open_matcher(args: argparse.Namespace, task: str, default: str | None) -> Matcher:
    """The model of the arguments, on a GPU where there is one.

    Args:
        args: With those of `add_arguments`.
        task: "stereo" or "flow".
        default: Name of the model where none is given; None where one must be.

    Raises:
        VisionAttnError: There is no such model or file, it has no weights, or it does something else.
    """
    if args.model is None and args.checkpoint is None and default is None:
        raise InputError(f"No weights for {task} are shipped: give a weight file with --model FILE.")
    model = open_model(args.model or (None if args.checkpoint else default), args.checkpoint, task=task).model
    if torch.cuda.is_available():
        model = model.cuda()
    return Matcher(model, task, args.precision, args.max_pixels, args.low_resolution_start, args.enlarge)


@contextmanager
def naming(job: Job) -> Iterator[None]:
    """Let errors say which job they are of."""
    try:
        yield
    except InputError as error:
        if str(job.source) in str(error):
            raise
        raise InputError(f"{job.source}: {error}") from error


def read_pair(job: Job) -> tuple[Picture, Picture]:
    """Both images of a job.

    Raises:
        DataError: One is damaged, or no image.
        InputError: They have different sizes.
    """
    first, second = (read(path) for path in job.sources)
    _check_sizes(job, [picture.pixels.shape[:2] for picture in (first, second)])
    return first, second


def convert_pair(job: Job, bar: Bar, convert: Callable[..., np.ndarray | None]) -> None:
    """Make a video of frames of the job's videos (see `convert_videos`), as large as they are."""
    videos = [probe(source) for source in job.sources]
    sizes = [(video.height, video.width) for video in videos]
    _check_sizes(job, sizes)
    for note in convert_videos(job.sources, job.target, convert, sizes[0], bar.advance, bar.expect):
        bar.say(f"note: {job.source}: {note}.")


def _check_sizes(job: Job, sizes: Sequence[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        stated = " and ".join(f"{path} is {h} x {w}" for path, (h, w) in zip(job.sources, sizes))
        raise InputError(f"{stated}; both must have one size. Crop or scale one of them.")


def beside(target: Path, name: str, pixels: np.ndarray) -> None:
    """Write a picture (H, W) or (H, W, 3) of uint8 beside the output, as NAME_name.png."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    write(image_beside(target, name), Picture(pixels))
