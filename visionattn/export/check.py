"""Does the file compute what the model computes? ONNX Runtime against PyTorch, at several sizes and batches.

A Python branch on a size, or a pooling grid, is baked into a file without a word and is right at the size of the export
only. So a file with dynamic axes is always run at sizes that the export has not seen, one of which no window or patch
divides.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from visionattn.errors import ExportError, InputError, require
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec, size_text

__all__ = ["TOLERANCE", "CheckRow", "check_onnx", "check_sizes", "print_rows"]

# Largest absolute error that passes: the first number + the second x the spread of the reference over images.
TOLERANCE = (1e-6, 1e-4)

# In addition, rounding: so many times float32's epsilon at the largest number of the output. An output may lie far from
# 0 and hardly vary over images.
ROUNDINGS = 16

# Share of an image's numbers that may be further away where the model decides: what depends on a decision that rounding
# turned. A mistake is wrong in far more of them.
OUTLIERS = 0.02

# Draws of images for a model that decides: a decision that rounding turned stands in one of them, a mistake in all.
DRAWS = 4

# A model whose outputs for two images are nearer than this says nothing of them: any file would agree with it.
LEAST_SPREAD = 1e-4
_CONSTANT = "the model's outputs for two images differ by"


@dataclass(frozen=True)
class CheckRow:
    """One comparison. One that is impossible, or proves nothing, has an infinite error and says why.

    `errors` has the largest of each image, where the model decides the largest without the share of `OUTLIERS`.
    `spread` is the largest difference between the model's outputs for two images: what an output says of its image.
    `rounding` is the error of PyTorch itself in float32, where that was asked for.
    """

    output: str
    batch: int
    height: int
    width: int
    errors: tuple[float, ...]
    spread: float
    allowed: float
    reason: str = ""
    rounding: float = 0.0

    @property
    def error(self) -> float:
        """The largest error of all images, NaN if there is one."""
        return float(np.max(self.errors))

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        found = self.reason or f"error {self.error:.2g}, allowed {self.allowed:.2g}"
        found += f", PyTorch's own in float32 {self.rounding:.2g}" if self.rounding else ""
        return f"{self.output} at {size_text(self.height, self.width)}, batch {self.batch}: {found}"


def frozen(model: nn.Module) -> nn.Module:
    """A float32 CPU copy in evaluation mode: the caller's model keeps its mode, type and device."""
    return copy.deepcopy(model).eval().to("cpu", torch.float32).requires_grad_(False)


def outputs_of(model: nn.Module, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run the model in PyTorch; one output counts as a sequence of one.

    Raises:
        InputError: The model itself does not accept these images.
    """
    try:
        with torch.no_grad():
            outputs = model(*images)
    # A model refuses a size in as many ways as there are layers.
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} itself does not run at {size_text(*images[0].shape[2:])}: {error} "
            "If it takes one size only, export that size with --static-size (dynamic_size=False); if it takes "
            "multiples of a number, state it as the attribute `size_multiple`."
        ) from error
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def scaled_size(size: int, factor: float, spec: ExportSpec) -> int:
    """An accepted size near `factor * size`: a prime where any size is, since no window or patch divides it."""
    size = max(round(factor * size), spec.size_minimum or 1, 2)
    if spec.size_multiple > 1:
        return spec.size_multiple * math.ceil(size / spec.size_multiple)
    while any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        size += 1
    return size


def check_sizes(spec: ExportSpec) -> list[tuple[int, int]]:
    """The sizes that a file is checked at: its own and, if it is dynamic, two very different ones.

    One is taller than wide and, where any size is accepted, no multiple of any window; the other is the stated minimum,
    or wider than tall where none is stated.
    """
    height, width = spec.input_size[1:]
    if not spec.dynamic_size:
        return [(height, width)]
    tall = scaled_size(height, 1.6, spec), scaled_size(width, 0.6, spec)
    wide = scaled_size(height, 0.6, spec), scaled_size(width, 1.6, spec)
    minimum = spec.size_minimum or min(height, width)
    return [(height, width), tall, (minimum, minimum) if minimum < min(height, width) else wide]


def random_images(spec: ExportSpec, batch: int, size: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """One image batch an input, in the input range, normalised as the file's metadata says.

    Like photographs, an image varies as much over its whole as from pixel to pixel: it is the mean of noise on the grid
    itself, on one half as fine, and so on. On pure noise a network trained on photographs may leave all bounds, where
    rounding alone makes its outputs differ.

    Several inputs are views of one scene, each image of which is moved sideways by its own few pixels: where nothing
    matches, what is compared is which of many wrong matches rounding prefers.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.input_range
    channels = spec.input_size[0]
    mean = torch.tensor(spec.mean or [0.0]).view(-1, 1, 1)
    std = torch.tensor(spec.std or [1.0]).view(-1, 1, 1)
    height, width = size
    reach = width // 8 if len(spec.input_names) > 1 else 0
    scene_size = height, width + reach
    octaves = [
        F.interpolate(torch.rand(batch, channels, *grid, generator=generator), scene_size, mode="bilinear")
        for grid in _halvings(scene_size)
    ]
    scenes = (torch.stack(octaves).mean(0) * (high - low) + low - mean) / std
    images = []
    for _ in spec.input_names:
        starts = torch.randint(reach + 1, (batch,), generator=generator).tolist()
        images.append(torch.stack([scene[..., x : x + width] for scene, x in zip(scenes, starts)]))
    return images


def _halvings(size: tuple[int, int]) -> list[tuple[int, int]]:
    """A size, its half, and so on while both sides have a pixel."""
    height, width = size
    return [(height >> level, width >> level) for level in range(min(size).bit_length())]


def check_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    tolerance: tuple[float, float] = TOLERANCE,
) -> list[CheckRow]:
    """Compare an exported file in ONNX Runtime (CPU) with the model in PyTorch, on random images from a fixed seed.

    A model whose attribute `decides` is true is compared in float64: where rounding turns a decision, neither of two
    results in float32 is the right one.

    Args:
        model: The model that was exported. It is not changed.
        path: The file.
        sizes: Heights and widths. Default: `check_sizes` of what the file accepts.
        batches: Batch sizes. Default: 1 and 3, or twice the one that the file is fixed to.
        tolerance: Absolute and relative part of the largest error that passes: `absolute + relative * spread`. The
            rounding of float32 is added to it (see `ROUNDINGS`).

    Returns:
        One row an output, size and batch; all have passed.

    Raises:
        ExportError: The file is malformed, or some rows fail; the message lists them.
        InputError: The file cannot be loaded, or the model itself does not run at a size.
    """
    onnx = require("onnx", "export")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exported file is not valid ONNX: {error}") from error
    file = OnnxModel(path)
    model = frozen(model)
    if batches is None:
        batches = (file.spec.batch or 1, file.spec.batch or 3)
    rows: list[CheckRow] = []
    decides = getattr(model, "decides", False)
    exact, draws = (copy.deepcopy(model).double(), DRAWS) if decides else (model, 1)
    for size in check_sizes(file.spec) if sizes is None else sizes:
        file.spec.check_size(*size)
        best: list[CheckRow] = []
        for draw in range(draws):
            found = _check_size(exact, file, file.spec, size, batches, tolerance, draw * len(batches))
            best = [_better(*pair) for pair in zip(best or found, found)]
            if all(row.passed for row in best):
                break
        if decides and not all(row.passed for row in best):
            own = _check_size(exact, functools.partial(_in_float32, model), file.spec, size, batches, tolerance, 0)
            best = [dataclasses.replace(row, rounding=other.error) for row, other in zip(best, own)]
        rows += best
    _raise_for(rows, file.spec)
    return rows


def _raise_for(rows: Sequence[CheckRow], spec: ExportSpec) -> None:
    failed = [row for row in rows if not row.passed]
    if not failed:
        return
    constant = [row for row in failed if row.reason.startswith(_CONSTANT)]
    if constant:
        least, names = min(row.spread for row in constant), dict.fromkeys(row.output for row in constant)
        raise ExportError(
            f"The output of {spec.model} ({', '.join(names)}) hardly depends on the image: those of two images differ "
            f"by {least:.1g} only, so that a comparison proves nothing. Its weights are untrained, or the wrong ones: "
            "give trained weights, or leave out the check by --no-check (check=False)."
        )
    if all(row.rounding > row.allowed for row in failed):
        raise ExportError(
            f"What {spec.model} computes hangs on rounding: in float32 PyTorch itself is further from float64 than the "
            f"check allows a file to be: {failed[0]}. Untrained weights do so: give trained ones, or leave out the "
            "check by --no-check (check=False)."
        )
    text = f"The exported file does not compute what the model computes in {len(failed)} of {len(rows)} checks: "
    first: dict[object, CheckRow] = {}
    for row in failed:
        first.setdefault(row.reason or row, row)  # what fails for one reason everywhere is said once
    text += "; ".join(map(str, first.values())) + "."
    if spec.dynamic_size:
        text += (
            " Errors that grow away from the size of the export come from a size baked in by a Python branch or by "
            "pooling to a grid; --static-size exports one fixed size."
        )
    raise ExportError(text)


def _in_float32(model: nn.Module, *arrays: np.ndarray) -> list[np.ndarray]:
    return [output.numpy() for output in outputs_of(model, [torch.from_numpy(array) for array in arrays])]


def _check_size(
    model: nn.Module,
    compute: Callable[..., Sequence[np.ndarray]],
    spec: ExportSpec,
    size: tuple[int, int],
    batches: Sequence[int],
    tolerance: tuple[float, float],
    seed: int,
) -> list[CheckRow]:
    """Compare what is computed from float32 images with the model, in the model's dtype."""
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    images = [random_images(spec, batch, size, seed + number) for number, batch in enumerate(batches)]
    expected = [outputs_of(model, [image.to(dtype) for image in inputs]) for inputs in images]
    together = [torch.cat(outputs) for outputs in zip(*expected)]
    scales = [(_spread(outputs), outputs.abs().max().item()) for outputs in together]
    share = OUTLIERS if getattr(model, "decides", False) else 0.0
    rows: list[CheckRow] = []
    for inputs, outputs in zip(images, expected):
        rows += _compare(compute, spec, inputs, outputs, scales, tolerance, share)
    return rows


def _better(one: CheckRow, other: CheckRow) -> CheckRow:
    """One row of two draws: of each place in the batch the smaller error, and of what is allowed the less."""
    if one.reason or other.reason:
        return other if one.reason else one
    strict = min(one, other, key=lambda row: row.allowed)
    return dataclasses.replace(strict, errors=tuple(np.fmin(one.errors, other.errors).tolist()))


def _spread(outputs: torch.Tensor) -> float:
    return (outputs - outputs[:1]).abs().max().item() if len(outputs) > 1 else outputs.abs().max().item()


def _compare(
    compute: Callable[..., Sequence[np.ndarray]],
    spec: ExportSpec,
    images: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    scales: Sequence[tuple[float, float]],
    tolerance: tuple[float, float],
    share: float,
) -> list[CheckRow]:
    reason = ""
    try:
        actual = compute(*(image.numpy() for image in images))
    except InputError as problem:
        reason = str(problem).rstrip(".")
        actual = [np.empty(0)] * len(expected)
    rows = []
    batch, _, height, width = images[0].shape
    for name, reference, result, (spread, largest) in zip(spec.output_names, expected, actual, scales):
        why, errors = reason, (math.inf,) * batch
        rounding = ROUNDINGS * float(np.finfo(np.float32).eps) * largest
        if not why and result.shape != tuple(reference.shape):
            why = f"shape {result.shape} instead of {tuple(reference.shape)}"
        elif not why and not math.isfinite(spread):
            why = "the model's own outputs are not finite"
        elif not why and spread < max(LEAST_SPREAD, 10 * rounding):
            why = f"{_CONSTANT} {spread:.1g} only"
        elif not why:
            difference = np.abs(result - reference.numpy()).reshape(batch, -1)
            # With a share of 0 the largest; NaN stays NaN.
            errors = tuple(np.quantile(difference, 1 - share, axis=1, method="lower").tolist())
        allowed = tolerance[0] + tolerance[1] * spread + rounding
        rows.append(CheckRow(name, batch, height, width, errors, spread, allowed, why))
    return rows


def print_rows(rows: Sequence[CheckRow], console: Console) -> None:
    """Print the rows of `check_onnx` as a table."""
    one_size = len({(row.height, row.width) for row in rows}) == 1
    table = Table(
        title="ONNX Runtime against PyTorch, random images",
        caption="The file has one fixed size: no other was checked." if one_size else None,
    )
    for header in ("output", "batch", "size", "error", "allowed", "spread", ""):
        table.add_column(header, justify="left" if header in ("output", "") else "right")
    for row in rows:
        table.add_row(
            row.output,
            str(row.batch),
            size_text(row.height, row.width),
            f"{row.error:.1e}",
            f"{row.allowed:.1e}",
            f"{row.spread:.3g}",
            "pass" if row.passed else "FAIL",
        )
    console.print(table)
