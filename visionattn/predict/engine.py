"""What computes a tile: PyTorch, or an exported file in ONNX Runtime; `open_engine` opens what a user names.

An engine is called with a float tensor (B, C, h, w) in 0..1 on the CPU and gives (B, C, r h, r w), same type, not
clamped. It states `scale`, `channels`, `radius` (pixels of the input that reach one of the result), `dtype` of its
input, and `bytes_per_pixel` and `device` for the size of tiles.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.checkpoints import create
from visionattn.devices import find_device
from visionattn.errors import InputError, MissingPackageError, VisionAttnError, shorten
from visionattn.export import OnnxModel, export_onnx
from visionattn.models import check_task
from visionattn.models.span import TRAINED_HERE
from visionattn.predict.network import Network, is_onnx_file, open_network, to_pictures, weight_of
from visionattn.predict.tiles import bytes_per_pixel

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
# Exporting for ONNX Runtime takes about ten seconds; a run shorter than this does not earn them back.
WORTH_TIMING = 60.0
SAMPLE = 192  # pixels a side of what is timed

# Nearer than half an 8-bit level: the two engines give the same picture.
AGREEMENT = 1e-3
# ONNX Runtime keeps what it has allocated: measured 1.1 to 1.2 times what PyTorch is reckoned to take.
ARENA = 1.25


def check_upscaler(model: nn.Module) -> None:
    """Raise `InputError` for a model that cannot upscale images."""
    facts: Any = model
    check_task(model, "restore")
    missing = [key for key in ("scale", "in_chans", "radius") if not hasattr(model, key)]
    if missing:
        raise InputError(f"{type(model).__name__} does not state its {', '.join(missing)} as attributes.")
    if getattr(model, "out_chans", facts.in_chans) != facts.in_chans:
        raise InputError(f"{type(model).__name__} makes {facts.out_chans} channels of {facts.in_chans}: not taken.")


class Engine(ABC):
    """What all engines state, taken from a model of the task "restore".

    Args:
        model: States `task`, `scale`, `in_chans` and `radius`.

    Raises:
        InputError: The model does something else than upscaling.
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
        dtype: As `Network` takes it; what is computed again is a tile.
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

    One that takes uint8 pictures gets tiles rounded to 8 bits, and so does its result: nothing is lost of pictures of 8
    bits, but the lower half of those of 16.

    Args:
        file: The file.
        model: The model that it was exported from, for its facts. Default: the zoo's model of the name in the file.
    """

    name = "onnxruntime"

    def __init__(self, file: OnnxModel, model: nn.Module | None = None) -> None:
        spec = file.spec
        if spec.task != "restore":
            raise InputError(f"The ONNX file of {spec.model} does not upscale images: its task is {spec.task!r}.")
        if not spec.dynamic_size:
            raise InputError(f"The ONNX file of {spec.model} takes one size only: export it without --static-size.")
        super().__init__(model or create(spec.model, in_chans=spec.input_size[0]).eval())
        self.file = file
        # The exported model may have been built with other arguments than its name has.
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
            # Its outputs are compared on the picture itself, which says more than random images.
            file = export_onnx(model, Path(folder) / "model.onnx", check=False)
            return cls(OnnxModel(file.path), model)


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


def open_engine(
    model: str | Path | nn.Module | None = None,
    checkpoint: str | Path | None = None,
    *,
    scale: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "auto",
) -> Engine:
    """Open what upscales (arguments: see `visionattn.upscale`).

    Raises:
        VisionAttnError: There is no such model or file, or it does something else; or arguments contradict each other.
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
        raise InputError(f"{name} enlarges {found.scale} times, not {scale}: leave out --scale.")
    return found


def choose_engine(engine: Engine, pixels: np.ndarray, pictures: int) -> tuple[Engine, str | None]:
    """Where `pictures` such pictures take long on the CPU, the faster of two engines, and a line that says why.

    Args:
        engine: What computes them so far.
        pixels: One of them, (H, W, C) of uint8, uint16 or floats in 0..1.
        pictures: How many there are.
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
    """Time an engine and the same model in ONNX Runtime on a tile; give the faster one, and a line that says why.

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
    times = f"{seconds:.2f} s a tile in PyTorch, {their_seconds:.2f} s in ONNX Runtime"
    difference = float((mine - theirs).abs().max())
    if not difference <= AGREEMENT:
        return engine, f"PyTorch: the outputs of ONNX Runtime differ by {difference:.2g}"
    return (other, f"ONNX Runtime: {times}") if their_seconds < seconds else (engine, f"PyTorch: {times}")


def _timed(engine: Engine, images: Tensor) -> tuple[Tensor, float]:
    """The second pass counts: the first allocates and prepares."""
    engine(images)
    start = time.perf_counter()
    result = engine(images)
    return result, time.perf_counter() - start
