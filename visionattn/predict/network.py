"""A model in a chosen dtype, with clear errors if the memory is insufficient."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.checkpoints import create
from visionattn.devices import find_device
from visionattn.errors import InputError, explaining_memory, shorten
from visionattn.export import OnnxModel
from visionattn.opening import open_model

__all__ = [
    "DTYPES",
    "PRECISIONS",
    "Network",
    "OnnxNetwork",
    "is_onnx_file",
    "open_network",
    "to_pictures",
    "weight_of",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # old spellings


def weight_of(model: nn.Module) -> Tensor:
    """A weight, whose device and dtype are the model's; a scalar on the CPU for a model without weights."""
    return next(model.parameters(), torch.zeros(()))


def open_network(
    model: str | Path | nn.Module | None, checkpoint: str | Path | None, task: str, device: str | torch.device
) -> nn.Module:
    """Open a model on a device.

    Args:
        model: As in `open_model`, or an exported file. A module is not changed.
        checkpoint: As in `open_model`.
        task: Required task.
        device: As in `find_device`; "auto" leaves a module on its device.

    Raises:
        VisionAttnError: The model, file or device does not exist, or the model has no weights or another task.
    """
    if is_onnx_file(model):
        if checkpoint is not None or (device != "auto" and find_device(device).type != "cpu"):
            raise InputError(
                f"{shorten(model)} contains its weights and runs on the CPU here: leave out --checkpoint and --device."
            )
        return OnnxNetwork(str(model), task)
    found = open_model(model, checkpoint, task=task).model
    if not isinstance(model, nn.Module):
        return found.to(find_device(device))
    if device == "auto" or weight_of(model).device == find_device(device):
        return found
    return copy.deepcopy(found).to(find_device(device))


def is_onnx_file(name: object) -> bool:
    """Whether the name of a model is an exported file, by its suffix."""
    return isinstance(name, (str, Path)) and str(name).lower().endswith((".onnx", ".ort"))


def to_pictures(images: Tensor) -> np.ndarray:
    """Floats (B, C, H, W) in 0..1 -> uint8 images (B, H, W, C)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).contiguous().numpy()


class OnnxNetwork(nn.Module):
    """An exported file or variant as a module, on the CPU in the file's own precision.

    Args:
        path: The file.
        task: Required task.

    Attributes:
        outline: The zoo's model of that name, without its weights, to estimate the memory.

    Raises:
        InputError: The file does not exist, cannot be loaded, has another task, or takes only one size.
        UnknownNameError: The zoo has no model of that name.
    """

    def __init__(self, path: str | Path, task: str) -> None:
        super().__init__()
        self.file = OnnxModel(path)
        spec = self.file.spec
        self.task = spec.task
        if spec.task != task:
            raise InputError(f"{shorten(path)} cannot be used here: its task is {spec.task!r}, not {task!r}.")
        if not spec.dynamic_size or spec.batch not in (None, 1):
            raise InputError(f"{shorten(path)} has a fixed size or batch: export it without --static-size and --batch.")
        self.size_minimum = spec.size_minimum or 1
        self.outline = create(spec.model).eval()
        self.eval()

    def forward(self, *images: Tensor) -> Tensor:
        """(B, C, H, W) for each input -> the first output."""
        pictures = self.file.spec.input_type == "uint8"
        arrays = [to_pictures(image) if pictures else image.numpy() for image in images]
        return torch.from_numpy(self.file(*arrays)[0])


class Network:
    """Runs a model on its own device in a chosen dtype.

    Args:
        model: Not changed.
        dtype: "float32", "float16", "bfloat16", the same as a `torch.dtype`, or "auto": float16 on a GPU, the type of
            the weights on a CPU. If a half-precision result is not finite, it is computed again with the model's own
            weights, and a note is added.
        remedy: Advice for the message if the memory is insufficient.

    Attributes:
        model: The model in evaluation mode.
        device: Its device.
        compute_dtype: The dtype of the computation.
        notes: One note per result that was computed again.

    Raises:
        InputError: The dtype does not exist.
    """

    def __init__(self, model: nn.Module, dtype: str | torch.dtype, remedy: str) -> None:
        name = str(dtype).removeprefix("torch.")
        name = PRECISIONS.get(name, name)
        if name not in ("auto", *DTYPES):
            allowed = ", ".join(map(repr, ("auto", *DTYPES)))
            raise InputError(f"dtype must be one of {allowed}; got {shorten(dtype)!r}.")
        if isinstance(model, OnnxNetwork) and name != "auto":
            raise InputError(f"{shorten(model.file.path)} runs in its own precision: leave out --dtype (dtype=).")
        if model.training:
            model = copy.deepcopy(model).eval()
        weight = weight_of(model)
        self.device, own = weight.device, weight.dtype
        if name == "auto":
            chosen = torch.float16 if self.device.type == "cuda" and own == torch.float32 else own
        else:
            chosen = DTYPES[name]
        self.model = model
        self.compute_dtype = chosen
        self.notes: list[str] = []
        self._fast = model if chosen == own else copy.deepcopy(model).to(chosen)
        self._remedy = remedy

    @torch.no_grad()
    def __call__(self, *images: Tensor) -> Tensor:
        """Run the model on floats (B, C, H, W) on the CPU; returns the result in their dtype on the CPU.

        Raises:
            InputError: There is not enough memory.
        """
        result = self._compute(self._fast, images)
        if self._fast is not self.model and not result.isfinite().all():
            self.notes.append(f"{self.compute_dtype} overflowed".replace("torch.", ""))
            result = self._compute(self.model, images)
        return result

    def _compute(self, model: nn.Module, images: tuple[Tensor, ...]) -> Tensor:
        weight = weight_of(model)
        height, width = images[0].shape[-2:]
        with explaining_memory(f"{height} x {width} pixels", self._remedy):
            return model(*(image.to(weight.device, weight.dtype) for image in images)).to("cpu", images[0].dtype)
