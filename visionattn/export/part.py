"""What becomes one exported file: a model, its metadata and the inputs to trace it with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from visionattn.errors import ExportError, InputError
from visionattn.export.check import frozen, outputs_of, random_images
from visionattn.export.sizes import scaled_size
from visionattn.export.spec import ExportSpec

__all__ = ["Form", "Part", "whole"]


class Form(NamedTuple):
    """The requested form of a file, and its origin (fields: see `export_onnx`)."""

    input_size: tuple[int, int] | None
    dynamic_size: bool | None
    opset: int
    weights: str
    license: str | None
    batch: int | None


@dataclass(frozen=True)
class Part:
    """A file to write, and the model in it.

    Attributes:
        path: The file: a program of torch.export if it ends in .pt2, otherwise ONNX.
        model: The model, in float32 and evaluation mode on the CPU.
        spec: The file's metadata.
        inputs: Inputs to trace with, with more than one element on each dynamic axis, since 1 is a special case.
        pair: For the head of a pair, the model that tower and head are compared with.
    """

    path: Path
    model: nn.Module
    spec: ExportSpec
    inputs: Sequence[torch.Tensor]
    pair: nn.Module | None = None


def whole(model: nn.Module, path: str | Path, form: Form) -> Part:
    """A model of images as one file.

    Batch, height and width of its inputs are no special cases: not 1, native, square or a multiple of a window. A
    traced branch is then that of the general case, such as non-zero padding. The sizes are larger than the native
    ones: the tracer treats a size of 1, such as the number of windows of a small map, as constant.

    Raises:
        ExportError: The model does not return one output per name.
        InputError: The model does not accept the size.
    """
    if form.batch is not None and form.batch < 1:
        raise InputError(f"The batch must be at least 1; got {form.batch}.")
    model = frozen(model)
    spec = ExportSpec.of(model, *form)
    height, width = spec.input_size[1:]
    if spec.dynamic_size:
        height, width = scaled_size(height, 1.25, spec), scaled_size(width, 1.5, spec)
    images = random_images(spec, spec.batch or 2, (height, width), seed=0)
    outputs = _count_outputs(model, images)
    if outputs != len(spec.output_names):
        raise ExportError(
            f"{spec.model} returns {outputs} outputs, but has the output names {', '.join(spec.output_names)}. "
            "Set its attribute `output_names` to one name per output."
        )
    return Part(Path(path), model, spec, images)


def _count_outputs(model: nn.Module, images: Sequence[torch.Tensor]) -> int:
    """The number of outputs, by shapes alone where that suffices: computing them takes minutes for large networks."""
    try:
        return len(outputs_of(copy.deepcopy(model).to("meta"), [image.to("meta") for image in images]))
    except InputError:  # the model needs values, or it fails at this size
        return len(outputs_of(model, images))
