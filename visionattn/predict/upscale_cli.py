"""`visionattn upscale IN... OUT`: pictures, folders of pictures and videos, enlarged by a super-resolution model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from visionattn.errors import InputError
from visionattn.export import OnnxModel
from visionattn.models.span import TRAINED_HERE
from visionattn.opening import open_model
from visionattn.predict import batch
from visionattn.predict.batch import Bar, Job
from visionattn.predict.compare import side_by_side
from visionattn.predict.engine import Engine, OnnxEngine, TorchEngine, faster
from visionattn.predict.images import picture
from visionattn.predict.network import PRECISIONS
from visionattn.predict.restore import restore, tiles_of
from visionattn.predict.videos.video import VIDEOS, upscale_video

__all__ = ["add_arguments", "default_name", "run"]

# Exporting for ONNX Runtime takes about ten seconds; a run shorter than this does not earn them back.
WORTH_TIMING = 60.0
SAMPLE = 192  # pixels a side of what is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    formats = ", ".join(suffix[1:] for suffix in (*picture.READABLE, *VIDEOS))
    parser.add_argument("input", nargs="+", help=f"files, folders or patterns ({formats})")
    parser.add_argument("output", help="file, or folder for several inputs; the suffix says the format")
    parser.add_argument("--model", metavar="NAME|FILE", help="name of the zoo, weight file or exported .onnx")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="pick our model of that factor (default: 4)")
    batch.add_arguments(parser)
    parser.add_argument("--compare", action="store_true", help="also write bicubic and network side by side")
    parser.add_argument("--memory", type=float, metavar="MIB", help="memory of a pass; larger pictures are tiled")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles (default: the model's radius, exact)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: fp16 on a GPU")
    parser.add_argument(
        "--engine", choices=("auto", "torch", "onnxruntime"), default="auto", help="auto: the faster, in long runs"
    )


def default_name(scale: int) -> str:
    """The model that is shipped for a scale.

    Raises:
        InputError: None is.
    """
    name = f"va_span_ch26_x{scale}"
    if name not in TRAINED_HERE:
        scales = " and ".join(shipped.rpartition("_")[2] for shipped in TRAINED_HERE)
        raise InputError(f"No weights for x{scale} are shipped, only for {scales}: give your own with --model FILE.")
    return name


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 when every picture was written or skipped as asked, 1 when some were not.

    Raises:
        VisionAttnError: Nothing could be started: no such input, model or folder.
    """
    batch.keep_freed_memory()
    jobs = _jobs(args.input, args.output, args.compare)
    engine = _engine(args)
    tiles_of(engine, 1, 1, args.overlap, args.memory)  # which says what is wrong with these two
    return batch.run(jobs, _Work(args, engine).do, tuple(picture.WRITABLE), args)


def _jobs(inputs: list[str], output: str, compare: bool) -> list[Job]:
    """What to do, in order; the output's folder exists and can be written to."""
    found: list[tuple[Path, Path]] = []  # each input, and the output's path in a folder
    several = len(inputs) > 1
    for text in inputs:
        sources, many = batch.files_of(text, recursive=True, without=Path(output))
        root = Path(text)
        inside = root.is_dir()
        found += [(source, _named(source.relative_to(root) if inside else Path(source.name))) for source in sources]
        several |= many
    folder, named = batch.target_folder(output, several)
    jobs = []
    for source, name in found:
        target = folder / name if named else Path(output)
        also = (_comparison(target),) if compare and source.suffix.lower() not in VIDEOS else ()
        jobs.append(Job((source,), target, also))
    return jobs


def _named(source: Path) -> Path:
    """The output's name: the input's, in a format that can be written."""
    return source if source.suffix.lower() in (*picture.WRITABLE, *VIDEOS) else source.with_suffix(".png")


def _comparison(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


def _engine(args: argparse.Namespace) -> Engine:
    name = default_name(args.scale or 4) if args.model is None else args.model
    path = Path(name)
    engine: Engine
    if path.suffix.lower() == ".onnx":
        if args.engine == "torch" or args.precision != "auto":
            raise InputError(f"{name} runs in ONNX Runtime in fp32: leave out --engine and --precision.")
        engine = OnnxEngine(OnnxModel(path))
    else:
        model = open_model(name, task="restore").model
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

    def __init__(self, args: argparse.Namespace, engine: Engine) -> None:
        self.args = args
        self.engine = engine

    def do(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        """Read, upscale, write; or raise what keeps it from that. `remaining` jobs are left, with this one."""
        self.engine.notes.clear()
        notes = (self._video if job.is_video else self._image)(job, bar, remaining)
        if self.engine.notes:
            notes.append(f"{self.engine.notes[0]} in {len(self.engine.notes)} tiles, which were computed again")
        return notes

    def _image(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        height, width = picture.size_of(job.source)
        scale = self.engine.scale
        # Orientation may still swap the two, which changes nothing here.
        picture.check_size(job.target, scale * height, scale * width)
        source = picture.read(job.source)
        pixels = source.pixels
        self._choose_engine(pixels, remaining, bar)
        tiles = tiles_of(self.engine, pixels.shape[0], pixels.shape[1], self.args.overlap, self.args.memory)
        bar.expect(len(tiles) * (2 if pixels.shape[2] in (2, 4) else 1))
        source.pixels = self._enlarge(pixels, bar.advance)
        comparison = side_by_side(pixels, source.pixels) if self.args.compare else None
        # The output comes last: with it, the job is done.
        if comparison is not None:
            picture.write(_comparison(job.target), comparison)
        picture.write(job.target, source)
        return source.notes

    def _video(self, job: Job, bar: Bar, remaining: int) -> list[str]:
        def enlarge(frame: np.ndarray) -> np.ndarray:
            self._choose_engine(frame, remaining * (bar.steps or 1), bar)
            return self._enlarge(frame, lambda: None)

        notes = upscale_video(job.source, job.target, enlarge, self.engine.scale, bar.advance, bar.expect)
        return [*notes, "--compare is for images, not for video"] if self.args.compare else notes

    def _enlarge(self, pixels: np.ndarray, advance: Callable[[], None]) -> np.ndarray:
        return restore(self.engine, pixels, self.args.overlap, self.args.memory, advance)

    def _choose_engine(self, pixels: np.ndarray, pictures: int, bar: Bar) -> None:
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
            bar.say(f"engine: {reason}")
