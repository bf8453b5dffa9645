"""`upscale_files`: apply a super-resolution model to images, folders of images and videos."""

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
    """Upscale files, folders and videos, with a progress bar and one line of output per file.

    Args:
        inputs: One or several files, folders or patterns.
        output: A file, whose suffix determines the format; or a folder for several.
        model: See `visionattn.upscale`.
        scale: See `visionattn.upscale`.
        width: See `visionattn.upscale`; for images only.
        height: See `visionattn.upscale`; for images only.
        format: Format of images in a folder: a suffix of `FORMATS` without the dot. Default: that of the input.
        quality: Quality of JPEG and WebP, 1 to 100; default 95.
        checkpoint: See `visionattn.upscale`.
        overwrite: Replace existing outputs.
        skip_existing: Keep existing outputs, to resume an interrupted run.
        compare: Also write NAME_compare.png: bicubic interpolation and the network side by side.
        memory: See `visionattn.upscale`.
        overlap: See `visionattn.upscale`.
        device: See `visionattn.upscale`.
        dtype: See `visionattn.upscale`.
        engine: "torch", "onnxruntime", or "auto": the faster one if the run takes over a minute on a CPU.

    Returns:
        The written, skipped and failed files; a failed file does not end the run.

    Raises:
        VisionAttnError: The run could not start: an input, the model or the folder is missing.
    """
    check_sides(width, height)
    if quality is not None and not 1 <= quality <= 100:
        raise InputError(f"The quality must be from 1 to 100; got {quality}.")
    if format is not None and f".{format}" not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {shorten(format)!r}.")
    jobs = _jobs([inputs] if isinstance(inputs, (str, os.PathLike)) else inputs, output, compare, format)
    computes = open_engine(model, checkpoint, scale=scale, device=device, dtype=dtype, engine=engine)
    tiles_of(computes, 1, 1, overlap, memory)  # checks these two arguments
    work = _Work(computes, engine == "auto", memory, overlap, compare, (width, height), quality)
    return batch.run(jobs, work, tuple(picture.WRITABLE), overwrite=overwrite, skip_existing=skip_existing)


def _jobs(inputs: Sequence[str | Path], output: str | Path, compare: bool, form: str | None) -> list[Job]:
    """The jobs in order; the output's folder exists and is writable."""
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
        raise InputError(f"The suffix of {output} determines the format: leave out --format, which is for folders.")
    jobs = []
    for source, name in found:
        target = folder / name if named else Path(output)
        also = (_comparison(target),) if compare and source.suffix.lower() not in VIDEOS else ()
        jobs.append(Job((source,), target, also))
    return jobs


def _named(source: Path, form: str | None) -> Path:
    """The output's name: the input's, with the suffix of the requested format, or of one that can be written."""
    if form is not None and source.suffix.lower() not in VIDEOS:
        return source.with_suffix(f".{form}")
    return source if source.suffix.lower() in (*picture.WRITABLE, *VIDEOS) else source.with_suffix(".png")


def _comparison(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


@dataclass
class _Work:
    """Runs the jobs one after the other with a shared engine."""

    engine: Engine
    choosing: bool  # whether a faster engine may still be chosen
    memory: float | None
    overlap: int | None
    compare: bool
    sides: tuple[int | None, int | None]  # requested width and height
    quality: int | None

    def __call__(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, upscale and write, or raise an error. `remaining` is the number of jobs left, including this one."""
        self.engine.notes.clear()
        notes = (self._video if job.is_video else self._image)(job, bar, remaining)
        if self.engine.notes:
            notes.append(f"{self.engine.notes[0]} in {len(self.engine.notes)} tiles, which were computed again")
        return notes

    def _image(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        height, width = picture.size_of(job.source)
        scale = self.engine.scale
        if self.sides == (None, None):
            # The orientation may still swap the two, which does not matter here.
            picture.check_size(job.target, scale * height, scale * width)
        source = picture.read(job.source)
        pixels = source.pixels
        size = fit(pixels.shape, *self.sides)
        if size is not None:
            picture.check_size(job.target, *size)
        # The output is written last: it marks the job as done.
        if size is not None and shrinks(pixels, size):
            source.notes.append(
                f"it is already at least as large, and was only reduced to {size[0]} x {size[1]} pixels"
            )
            source.pixels = reduce(pixels, size)
        else:
            self._choose_engine(pixels, remaining, bar)
            bar.expect(steps_of(self.engine, pixels.shape, self.overlap, self.memory))
            source.pixels = self._enlarge(pixels, bar.advance)
            if self.compare:
                picture.write(_comparison(job.target), side_by_side(pixels, source.pixels))
            if size is not None:
                if size[0] > source.pixels.shape[0]:
                    source.notes.append(f"beyond a factor of {scale}, it was enlarged by interpolation")
                source.pixels = resample(source.pixels, size)
        picture.write(job.target, source, self.quality)
        return source.notes

    def _video(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        def enlarge(frame: np.ndarray) -> np.ndarray:
            self._choose_engine(frame, remaining * (bar.steps or 1), bar)
            return self._enlarge(frame, lambda: None)

        if self.sides != (None, None):
            raise InputError(
                f"{shorten(job.source)}: --width and --height are for images only; use --scale for videos."
            )
        notes = upscale_video(job.source, job.target, enlarge, self.engine.scale, bar.advance, bar.expect)
        return [*notes, "--compare is for images, not for video"] if self.compare else notes

    def _enlarge(self, pixels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        return restore(self.engine, pixels, self.overlap, self.memory, advance)

    def _choose_engine(self, pixels: np.ndarray, pictures: int, bar: Bar) -> None:
        """Once per run, if `pictures` such images take long, switch to the faster engine."""
        if self.choosing:
            self.choosing = False
            self.engine, reason = choose_engine(self.engine, pixels, pictures)
            if reason is not None:
                bar.say(f"engine: {reason}")
