"""Engines that compute a tile: PyTorch, or an exported file in ONNX Runtime; `open_engine` opens one by name.

An engine is called with a float tensor (B, C, h, w) in 0..1 on the CPU and returns (B, C, r h, r w) of the same type,
not clamped. It states `scale`, `channels`, `radius` (of the input pixels that an output pixel depends on), `dtype` of
its input, and `bytes_per_pixel` and `device` for the size of tiles.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from visionattn.checkpoints import create
from visionattn.devices import find_device
from visionattn.errors import InputError, MissingPackageError, VisionAttnError, shorten
from visionattn.export import OnnxModel, export_onnx
from visionattn.models import check_task
from visionattn.predict.network import Network, is_onnx_file, open_network, to_pictures, weight_of
from visionattn.predict.tiles import bytes_per_pixel
from visionattn.weights.span import SCALES

__all__ = [
    "ENGINES",
    "Engine",
    "OnnxEngine",
    "TorchEngine",
    "check_upscaler",
    "choose_engine",
    "default_name",
    "faster",
    "open_engine",
]

ENGINES = ("auto", "torch", "onnxruntime")
# Export for ONNX Runtime takes about ten seconds, which does not pay off in runs shorter than this, in seconds.
WORTH_TIMING = 60.0
SAMPLE = 192  # side of the timed sample in pixels

# Less than half an 8-bit level: the two engines give the same image.
AGREEMENT = 1e-3
# ONNX Runtime keeps its allocations: it was measured to take 1.1 to 1.2 times the estimate for PyTorch.
ARENA = 1.25


def check_upscaler(model: nn.Module) -> None:
    """Raise `InputError` for a model that cannot upscale images."""
    facts: Any = model
    check_task(model, "restore")
    missing = [key for key in ("scale", "in_chans", "radius") if not hasattr(model, key)]
    if missing:
        raise InputError(f"{type(model).__name__} lacks the attributes {', '.join(missing)}.")
    if getattr(model, "out_chans", facts.in_chans) != facts.in_chans:
        raise InputError(
            f"{type(model).__name__} must have as many output as input channels; got {facts.out_chans} and "
            f"{facts.in_chans}."
        )


class Engine(ABC):
    """Base class of engines, with the properties of a model of the task "restore".

    Args:
        model: A model with the attributes `task`, `scale`, `in_chans` and `radius`.

    Raises:
        InputError: The model is not an upscaler.
    """

    name: str

    def __init__(self, model: nn.Module) -> None:
        check_upscaler(model)
        facts: Any = model
        weight = weight_of(model)
        self.scale: int = facts.scale
        self.channels: int = facts.in_chans
        self.radius: int = facts.radius
        self.device = weight.device
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.bytes_per_pixel = bytes_per_pixel(model, self.channels)
        self.notes: list[str] = []

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Upscale: (B, C, h, w) -> (B, C, r h, r w)."""


class TorchEngine(Engine):
    """The model itself, on its own device.

    Args:
        model: A model of the task "restore". Not changed.
        dtype: As in `Network`; single tiles are computed again.
    """

    name = "torch"

    def __init__(self, model: nn.Module, dtype: str | torch.dtype = "auto") -> None:
        network = Network(model, dtype, "lower --memory (memory=)")
        super().__init__(network.model)
        self.network = network
        self.model = network.model
        self.compute_dtype = network.compute_dtype
        self.notes = network.notes

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale: (B, C, h, w) -> (B, C, r h, r w)."""
        return self.network(images)


class OnnxEngine(Engine):
    """An exported file or variant in ONNX Runtime, on the CPU, in the file's own precision.

    For a file that takes uint8 images, tiles and results are rounded to 8 bits: nothing is lost for 8-bit images, but
    the lower 8 bits of 16-bit images are.

    Args:
        file: The file.
        model: The model that it was exported from, for its attributes. Default: the zoo's model named in the file.
    """

    name = "onnxruntime"

    def __init__(self, file: OnnxModel, model: nn.Module | None = None) -> None:
        spec = file.spec
        if spec.task != "restore":
            raise InputError(f"The ONNX file of {spec.model} does not upscale images: its task is {spec.task!r}.")
        if not spec.dynamic_size:
            raise InputError(f"The ONNX file of {spec.model} takes only one size: export it without --static-size.")
        super().__init__(model or create(spec.model, in_chans=spec.input_size[0]).eval())
        self.file = file
        # The exported model may have been built with other arguments than those of its name.
        self.scale = spec.scale or self.scale
        self.radius = self.radius if spec.radius is None else spec.radius
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.bytes_per_pixel *= ARENA

    def __call__(self, images: Tensor) -> Tensor:
        """Upscale: (B, C, h, w) -> (B, C, r h, r w)."""
        if self.file.spec.input_type != "uint8":
            return torch.from_numpy(self.file(images.numpy())[0]).to(images.dtype)
        return torch.from_numpy(self.file(to_pictures(images))[0]).movedim(-1, 1).to(images.dtype) / 255

    @classmethod
    def of(cls, model: nn.Module) -> OnnxEngine:
        """Export a model for this run.

        Raises:
            MissingPackageError: The packages of the extra `export` are not installed.
            ExportError: The model cannot be exported.
        """
        with tempfile.TemporaryDirectory() as folder:
            # Its outputs are compared on the image itself, which is a better check than random images.
            file = export_onnx(model, Path(folder) / "model.onnx", check=False)
            return cls(OnnxModel(file.path), model)


def default_name(scale: int) -> str:
    """Name of the shipped model for a scale.

    Raises:
        InputError: There is none.
    """
    names = {each: f"va_span_ch26_x{each}" for each in SCALES}
    shipped = {each: name for each, name in names.items() if timm.models.is_model_pretrained(name)}
    if scale not in shipped:
        scales = ", ".join(f"x{each}" for each in shipped)
        raise InputError(
            f"No weights are shipped for x{scale}, only for {scales}: give a weight file with --model FILE."
        )
    return shipped[scale]


def open_engine(
    model: str | Path | nn.Module | None = None,
    checkpoint: str | Path | None = None,
    *,
    scale: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "auto",
) -> Engine:
    """Open an upscaling engine (arguments: see `visionattn.upscale`).

    Raises:
        VisionAttnError: The model or file does not exist, or has another task; or arguments contradict each other.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(map(repr, ENGINES))}; got {shorten(engine)!r}.")
    if model is None and checkpoint is None:
        model = default_name(scale or 4)
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model or checkpoint)
    is_onnx = is_onnx_file(name)
    if is_onnx and (engine == "torch" or dtype != "auto" or (model and checkpoint)):
        raise InputError(
            f"{name} runs in ONNX Runtime in its own precision: leave out --engine, --dtype and --checkpoint."
        )
    if is_onnx or engine == "onnxruntime":
        if device != "auto" and find_device(device).type != "cpu":
            raise InputError(f"ONNX Runtime computes on the CPU here: leave out --device {shorten(device)} (device=).")
        if str(dtype).removeprefix("torch.") not in ("auto", "float32", "fp32"):
            raise InputError("ONNX Runtime computes in float32 here: leave out --dtype (dtype=).")
    found: Engine
    if is_onnx:
        found = OnnxEngine(OnnxModel(Path(name)))
    elif engine == "onnxruntime":
        found = OnnxEngine.of(TorchEngine(open_network(model, checkpoint, "restore", "cpu")).model)
    else:
        found = TorchEngine(open_network(model, checkpoint, "restore", device), dtype)
    if scale and found.scale != scale:
        raise InputError(f"The scale of {name} is {found.scale}, not {scale}: leave out --scale.")
    return found


def choose_engine(engine: Engine, pixels: np.ndarray, pictures: int) -> tuple[Engine, str | None]:
    """Return the faster of two engines if `pictures` such images take long on the CPU, and the reason.

    Args:
        engine: The current engine.
        pixels: One of the images, (H, W, C) of uint8, uint16 or floats in 0..1.
        pictures: Number of images.
    """
    if not isinstance(engine, TorchEngine) or engine.device.type != "cpu" or engine.compute_dtype != torch.float32:
        return engine, None
    peak = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    sample = torch.from_numpy(pixels[:SAMPLE, :SAMPLE, :1].astype(np.float32) / peak)
    sample = sample.movedim(-1, 0)[None].repeat(1, engine.channels, 1, 1)
    start = time.perf_counter()
    engine(sample)
    seconds = (time.perf_counter() - start) * pictures * pixels[..., 0].size / sample[0, 0].numel()
    return faster(engine, sample) if seconds > WORTH_TIMING else (engine, None)


def faster(engine: TorchEngine, images: Tensor) -> tuple[Engine, str]:
    """Time an engine and the same model in ONNX Runtime on a tile; return the faster one and the reason.

    Args:
        engine: A model on the CPU.
        images: The tile, (B, C, h, w).
    """
    try:
        other = OnnxEngine.of(engine.model)
        (mine, seconds), (theirs, their_seconds) = (_timed(candidate, images) for candidate in (engine, other))
    except MissingPackageError:
        return engine, "PyTorch: ONNX Runtime is not installed"
    except VisionAttnError as error:
        return engine, f"PyTorch: {error}"
    times = f"{seconds:.2f} s per tile in PyTorch, {their_seconds:.2f} s in ONNX Runtime"
    difference = float((mine - theirs).abs().max())
    if not difference <= AGREEMENT:
        return engine, f"PyTorch: the outputs of ONNX Runtime differ by {difference:.2g}"
    return (other, f"ONNX Runtime: {times}") if their_seconds < seconds else (engine, f"PyTorch: {times}")


def _timed(engine: Engine, images: Tensor) -> tuple[Tensor, float]:
    """Run twice and time the second run: the first one allocates and prepares."""
    engine(images)
    start = time.perf_counter()
    result = engine(images)
    return result, time.perf_counter() - start
