"""`upscale_files`: pictures, folders of pictures and videos, enlarged by a super-resolution model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visionattn.errors import InputError, shorten
from visionattn.predict import batch
from visionattn.predict.batch import Bar, Job, Outcome
from visionattn.predict.compare import side_by_side
from visionattn.predict.engine import Engine, choose_engine, open_engine
from visionattn.predict.images import picture
from visionattn.predict.restore import reduce, restore, shrinks, steps_of, tiles_of
from visionattn.predict.sizes import check_sides, fit, resample
from visionattn.predict.videos.video import VIDEOS, upscale_video

__all__ = ["FORMATS", "upscale_files"]

FORMATS = (".png", ".jpg", ".webp", ".tif")


def upscale_files(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    scale: int | None = None,
    width: int | None = None,
    height: int | None = None,
    format: str | None = None,
    quality: int | None = None,
    checkpoint: str | Path | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    compare: bool = False,
    memory: float | None = None,
    overlap: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "auto",
) -> Outcome:
    """Upscale files, folders and videos, with a progress bar and a line for each.

    Args:
        inputs: Files, folders or patterns, or one of them.
        output: A file, whose suffix says the format; or the folder for several.
        model: See `visionattn.upscale`, as for the arguments that are not here.
        scale: Likewise.
        width: Likewise; of images only.
        height: Likewise.
        format: Of the images in a folder, the suffix of one of `FORMATS` without its dot; default their own.
        quality: Of JPEG and WebP, 1 to 100; default 95.
        checkpoint: Likewise.
        overwrite: Replace outputs that exist.
        skip_existing: Leave outputs that exist, which goes on with a run that was stopped.
        compare: Also write NAME_compare.png: bicubic interpolation and the network side by side.
        memory: See `visionattn.upscale`.
        overlap: Likewise.
        device: Likewise.
        dtype: Likewise.
        engine: "torch", "onnxruntime", or "auto": the faster one where the run takes a CPU over a minute.

    Returns:
        What was written, skipped and failed: a file that cannot be done does not end the run.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder.
    """
    check_sides(width, height)
    if quality is not None and not 1 <= quality <= 100:
        raise InputError(f"The quality must be from 1 to 100; got {quality}.")
    if format is not None and f".{format}" not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {shorten(format)!r}.")
    jobs = _jobs([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs, output, compare, format)
    computes = open_engine(model, checkpoint, scale=scale, device=device, dtype=dtype, engine=engine)
    tiles_of(computes, 1, 1, overlap, memory)  # which says what is wrong with these two
    work = _Work(computes, engine == "auto", memory, overlap, compare, (width, height), quality)
    return batch.run(jobs, work, tuple(picture.WRITABLE), overwrite=overwrite, skip_existing=skip_existing)


def _jobs(inputs: Sequence[str | Path], output: str | Path, compare: bool, form: str | None) -> list[Job]:
    """What to do, in order; the output's folder exists and can be written to."""
    found: list[tuple[Path, Path]] = []  # each input, and the output's path in a folder
    several = len(inputs) > 1
    for given in inputs:
        sources, many = batch.files_of(given, recursive=True, without=Path(output))
        root = Path(given)
        inside = root.is_dir()
        found += [(file, _named(file.relative_to(root) if inside else Path(file.name), form)) for file in sources]
        several |= many
    folder, named = batch.target_folder(output, several)
    if form and not named:
        raise InputError(f"The suffix of {output} says the format: leave out --format, which is for folders.")
    jobs = []
    for source, name in found:
        target = folder / name if named else Path(output)
        also = (_comparison(target),) if compare and source.suffix.lower() not in VIDEOS else ()
        jobs.append(Job((source,), target, also))
    return jobs


def _named(source: Path, form: str | None) -> Path:
    """The output's name: the input's, in the format asked for, or one that can be written."""
    if form is not None and source.suffix.lower() not in VIDEOS:
        return source.with_suffix(f".{form}")
    return source if source.suffix.lower() in (*picture.WRITABLE, *VIDEOS) else source.with_suffix(".png")


def _comparison(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


@dataclass
class _Work:
    """Does one job after the other with what they share."""

    engine: Engine
    choosing: bool  # whether a faster engine may still take over
    memory: float | None
    overlap: int | None
    compare: bool
    sides: tuple[int | None, int | None]  # width and height that are asked for
    quality: int | None

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, upscale, write; or raise what keeps it from that. `remaining` jobs are left, with this one."""
        self.engine.notes.clear()
        notes = (self._video if job.is_video else self._image)(job, bar, remaining)
        if self.engine.notes:
            notes.append(f"{self.engine.notes[0]} in {len(self.engine.notes)} tiles, which were computed again")
        return notes

    def _image(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        height, width = picture.size_of(job.source)
        scale = self.engine.scale
        if self.sides == (None, None):
            # Orientation may still swap the two, which changes nothing here.
            picture.check_size(job.target, scale * height, scale * width)
        source = picture.read(job.source)
        pixels = source.pixels
        size = fit(pixels.shape, *self.sides)
        if size is not None:
            picture.check_size(job.target, *size)
        # The output comes last: with it, the job is done.
        if size is not None and shrinks(pixels, size):
            source.notes.append(f"it is as large already, and was only brought to {size[0]} x {size[1]} pixels")
            source.pixels = reduce(pixels, size)
        else:
            self._choose_engine(pixels, remaining, bar)
            bar.expect(steps_of(self.engine, pixels.shape, self.overlap, self.memory))
            source.pixels = self._enlarge(pixels, bar.advance)
            if self.compare:
                picture.write(_comparison(job.target), side_by_side(pixels, source.pixels))
            if size is not None:
                if size[0] > source.pixels.shape[0]:
                    source.notes.append(f"beyond {scale} times as high, it was enlarged by interpolation")
                source.pixels = resample(source.pixels, size)
        picture.write(job.target, source, self.quality)
        return source.notes

    def _video(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        def enlarge(frame: np.ndarray) -> np.ndarray:
            self._choose_engine(frame, remaining * (bar.steps or 1), bar)
            return self._enlarge(frame, lambda: None)

        if self.sides != (None, None):
            raise InputError(
                f"{shorten(job.source)}: --width and --height are of images, a video is enlarged by --scale."
            )
        notes = upscale_video(job.source, job.target, enlarge, self.engine.scale, bar.advance, bar.expect)
        return [*notes, "--compare is for images, not for video"] if self.compare else notes

    def _enlarge(self, pixels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        return restore(self.engine, pixels, self.overlap, self.memory, advance)

    def _choose_engine(self, pixels: np.ndarray, pictures: int, bar: Bar) -> None:
        """Once in a run, where `pictures` such pictures take long, let the faster engine do them."""
        if self.choosing:
            self.choosing = False
            self.engine, reason = choose_engine(self.engine, pixels, pictures)
            if reason is not None:
                bar.say(f"engine: {reason}")
