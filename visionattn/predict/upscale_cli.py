"""`visionattn upscale IN... OUT`: pictures, folders of pictures and videos, enlarged by a super-resolution model."""

from __future__ import annotations

import argparse
import ctypes
import glob
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from timm.models import get_pretrained_cfg
from torch import nn

from visionattn.checkpoints import create, load
from visionattn.errors import CheckpointError, DataError, InputError, StorageError, UnknownNameError, VisionAttnError
from visionattn.export import OnnxModel
from visionattn.models.span import SHIPPED
from visionattn.predict import picture
from visionattn.predict.compare import side_by_side
from visionattn.predict.engine import PRECISIONS, Engine, OnnxEngine, TorchEngine, check_task, faster
from visionattn.predict.restore import restore, tiles_of
from visionattn.predict.video import VIDEOS, probe, upscale_video

__all__ = ["add_arguments", "default_name", "pretrained", "run"]

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
# Exporting for ONNX Runtime takes about ten seconds; a run shorter than this does not earn them back.
WORTH_TIMING = 60.0
SAMPLE = 192  # pixels a side of what is timed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    formats = ", ".join(suffix[1:] for suffix in (*picture.READABLE, *VIDEOS))
    parser.add_argument("input", nargs="+", help=f"files, folders or patterns ({formats})")
    parser.add_argument("output", help="file, or folder for several inputs; the suffix says the format")
    parser.add_argument("--model", metavar="NAME|FILE", help="name of the zoo, weight file or exported .onnx")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="pick our model of that factor (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument("--skip-existing", action="store_true", help="leave outputs that exist: resumes a stopped run")
    parser.add_argument("--compare", action="store_true", help="also write bicubic and network side by side")
    parser.add_argument("--memory", type=float, metavar="MIB", help="memory of a pass; larger pictures are tiled")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles (default: the model's radius, exact)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: fp16 on a GPU")
    parser.add_argument(
        "--engine", choices=("auto", "torch", "onnxruntime"), default="auto", help="auto: the faster, in long runs"
    )


@dataclass(frozen=True)
class Job:
    """A file to read and the file to write."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """Whether the file is a video, by its suffix."""
        return self.source.suffix.lower() in VIDEOS


def default_name(scale: int) -> str:
    """The model that is shipped for a scale.

    Raises:
        InputError: None is.
    """
    name = f"va_span_ch26_x{scale}"
    if name not in SHIPPED:
        scales = " and ".join(shipped.rpartition("_")[2] for shipped in SHIPPED)
        raise InputError(f"No weights for x{scale} are shipped, only for {scales}: give your own with --model FILE.")
    return name


def pretrained(name: str) -> nn.Module:
    """A model of the zoo with its weights.

    Raises:
        UnknownNameError: There is no such model.
        InputError: It does something else than upscaling.
        CheckpointError: No weights are published for it.
    """
    try:
        config: Any = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownNameError(f"{error} Leave out the part after the dot for the default weights.") from error
    check_task(create(name, device="meta"))  # which knows the names nearest to an unknown one
    if not config.has_weights:
        raise CheckpointError(f"No weights of {name} are there: give a weight file with --model FILE.")
    return create(name, pretrained=True).eval()


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 when every picture was written or skipped as asked, 1 when some were not.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder.
    """
    _keep_freed_memory()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    jobs = _jobs(args.input, args.output)
    engine = _engine(args)
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        work = _Work(args, engine, console, progress)
        total = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        for number, job in enumerate(jobs):
            try:
                work.do(job, len(jobs) - number)
            except VisionAttnError as error:
                failed.append(str(job.source))
                console.print(f"failed: {error}")
            except MemoryError:
                failed.append(str(job.source))
                console.print(f"failed: {job.source}: picture and result do not fit the memory.")
            progress.advance(total)
    if failed and len(jobs) > 1:
        console.print(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def _keep_freed_memory() -> None:
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


def _jobs(inputs: list[str], output: str) -> list[Job]:
    """What to do, in order; the output's folder exists and can be written to."""
    sources, several = [], len(inputs) > 1
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (*picture.READABLE, *VIDEOS)]
            several = True
        elif path.exists():
            found = [path]
        elif glob.has_magic(text):
            found = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
            several = True
        else:
            raise DataError(f"There is no file or folder {text}.")
        if not found:
            raise DataError(f"{text} holds no image or video: {', '.join((*picture.READABLE, *VIDEOS))} are taken.")
        sources += found
    target = Path(output)
    into_folder = several or target.is_dir() or output.endswith("/") or not target.suffix
    folder = target if into_folder else target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"Cannot write into the folder {folder}: {error.strerror or error}.") from error
    return [Job(source, folder / _named(source) if into_folder else target) for source in sources]


def _named(source: Path) -> str:
    """The output's name in a folder: the input's, in a format that can be written."""
    return source.stem + ".png" if source.suffix.lower() == ".bmp" else source.name


def _engine(args: argparse.Namespace) -> Engine:
    name = args.model or default_name(args.scale or 4)
    path = Path(name)
    engine: Engine
    if path.suffix.lower() == ".onnx":
        if args.engine == "torch" or args.precision != "auto":
            raise InputError(f"{name} runs in ONNX Runtime in fp32: leave out --engine and --precision.")
        engine = OnnxEngine(OnnxModel(path))
    else:
        is_file = path.exists() or path.suffix.lower() in WEIGHT_FILES
        model: nn.Module = load(path) if is_file else pretrained(name)
        if torch.cuda.is_available() and args.engine != "onnxruntime":
            model = model.cuda()
        engine = TorchEngine(model, args.precision)
        if args.engine == "onnxruntime":
            if args.precision in ("fp16", "bf16"):
                raise InputError("ONNX Runtime computes in fp32 here: leave out --precision.")
            engine = OnnxEngine.of(engine.model)
    if args.scale and engine.scale != args.scale:
        raise InputError(f"{name} enlarges {engine.scale} times, not {args.scale}: leave out --scale.")
    return engine


class _Work:
    """Does one job after the other with what they share."""

    def __init__(self, args: argparse.Namespace, engine: Engine, console: Console, progress: Progress) -> None:
        self.args = args
        self.engine = engine
        self.console = console
        self.progress = progress
        self.written: set[Path] = set()

    def do(self, job: Job, remaining: int) -> None:
        """Read, upscale, write; or raise what keeps it from that. `remaining` jobs are left, with this one."""
        if self._is_done(job):
            self.console.print(f"skipped: {job.target} exists")
            return
        self.engine.notes.clear()
        bar = self.progress.add_task(job.source.name, total=None)
        try:
            notes = (self._video if job.is_video else self._image)(job, bar, remaining)
        finally:
            self.progress.remove_task(bar)
        self.written.add(job.target)
        if self.engine.notes:
            notes.append(f"{self.engine.notes[0]} in {len(self.engine.notes)} tiles, which were computed again")
        for note in notes:
            self.console.print(f"note: {job.source}: {note}.")
        self.console.print(f"wrote {job.target}")

    def _is_done(self, job: Job) -> bool:
        """Whether the result exists and shall stay; raises where it cannot be written."""
        known = VIDEOS if job.is_video else tuple(picture.WRITABLE)
        if job.target.suffix.lower() not in known:
            raise InputError(f"{job.source}: cannot write {job.target}: its suffix is none of {', '.join(known)}.")
        if job.target.resolve() == job.source.resolve():
            raise InputError(f"{job.source}: the output would replace the input: name another.")
        if job.target in self.written:
            raise InputError(f"{job.source}: {job.target} was written already, from another input of that name.")
        if not job.target.exists() or self.args.overwrite:
            return False
        if self.args.skip_existing:
            return True
        raise InputError(
            f"{job.source}: {job.target} exists: give --overwrite to replace it or --skip-existing to leave it."
        )

    def _image(self, job: Job, bar: TaskID, remaining: int) -> list[str]:
        height, width = picture.size_of(job.source)
        scale = self.engine.scale
        # Orientation may still swap the two, which changes nothing here.
        picture.check_size(job.target, scale * height, scale * width)
        source = picture.read(job.source)
        pixels = source.pixels
        self._choose_engine(pixels, remaining)
        tiles = tiles_of(self.engine, pixels.shape[0], pixels.shape[1], self.args.overlap, self.args.memory)
        self.progress.update(bar, total=len(tiles) * (2 if pixels.shape[2] in (2, 4) else 1))
        source.pixels = self._enlarge(pixels, lambda: self.progress.advance(bar))
        comparison = side_by_side(pixels, source.pixels) if self.args.compare else None
        picture.write(job.target, source)
        if comparison is not None:
            picture.write(job.target.with_name(f"{job.target.stem}_compare.png"), comparison)
        return source.notes

    def _video(self, job: Job, bar: TaskID, remaining: int) -> list[str]:
        frames = probe(job.source).frames
        self.progress.update(bar, total=frames)

        def enlarge(frame: np.ndarray) -> np.ndarray:
            self._choose_engine(frame, remaining * (frames or 1))
            return self._enlarge(frame, lambda: None)

        upscale_video(job.source, job.target, enlarge, self.engine.scale, lambda: self.progress.advance(bar))
        return ["--compare is for images, not for video"] if self.args.compare else []

    def _enlarge(self, pixels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        return restore(self.engine, pixels, self.args.overlap, self.args.memory, advance)

    def _choose_engine(self, pixels: np.ndarray, pictures: int) -> None:
        """Once in a run, where `pictures` such pictures take long, let the faster engine do them."""
        engine = self.engine
        if self.args.engine != "auto" or not isinstance(engine, TorchEngine) or engine.device.type != "cpu":
            return
        if engine.compute_dtype != torch.float32:
            return
        self.args.engine = "chosen"
        sample = torch.from_numpy(pixels[:SAMPLE, :SAMPLE, :1].astype(np.float32) / np.iinfo(pixels.dtype).max)
        sample = sample.movedim(-1, 0)[None].repeat(1, engine.channels, 1, 1)
        start = time.perf_counter()
        engine(sample)
        seconds = (time.perf_counter() - start) * pictures * pixels[..., 0].size / sample[0, 0].numel()
        if seconds > WORTH_TIMING:
            self.engine, reason = faster(engine, sample)
            self.console.print(f"engine: {reason}")
