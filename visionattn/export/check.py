"""Does the file compute what the model computes? ONNX Runtime against PyTorch, at several sizes and batches.

A Python branch on a size, or a pooling grid, is baked into a file without a word and is right at the size of the export
only. So a file with dynamic axes is always run at sizes that the export has not seen, one of which no window or patch
divides.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
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

# Draws of images for a model that decides: a decision that rounding turned stands in one of them, a mistake in all.
DRAWS = 4

# A model whose outputs for two images are nearer than this says nothing of them: any file would agree with it.
LEAST_SPREAD = 1e-4


@dataclass(frozen=True)
class CheckRow:
    """One comparison. One that is impossible, or proves nothing, has an infinite error and says why.

    `errors` has the largest of each image. `spread` is the largest difference between the model's outputs for two
    images: what an output says of its image.
    """

    output: str
    batch: int
    height: int
    width: int
    errors: tuple[float, ...]
    spread: float
    allowed: float
    reason: str = ""

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

    Args:
        model: The model that was exported. It is not changed.
        path: The file.
        sizes: Heights and widths. Default: `check_sizes` of what the file accepts.
        batches: Batch sizes. Default: 1 and 3, or twice the one that the file is fixed to.
        tolerance: Absolute and relative part of the largest error that passes: `absolute + relative * spread`.

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
    draws = DRAWS if getattr(model, "decides", False) else 1
    for size in check_sizes(file.spec) if sizes is None else sizes:
        file.spec.check_size(*size)
        best: list[CheckRow] = []
        for draw in range(draws):
            found = _check_size(model, file, size, batches, tolerance, draw * len(batches))
            best = [_better(*pair) for pair in zip(best or found, found)]
            if all(row.passed for row in best):
                break
        rows += best
    _raise_for(rows, file.spec)
    return rows


def _raise_for(rows: Sequence[CheckRow], spec: ExportSpec) -> None:
    failed = [row for row in rows if not row.passed]
    if not failed:
        return
    constant = [row for row in failed if row.spread < LEAST_SPREAD]
    if constant:
        least, names = min(row.spread for row in constant), dict.fromkeys(row.output for row in constant)
        raise ExportError(
            f"The output of {spec.model} ({', '.join(names)}) hardly depends on the image: those of two images differ "
            f"by {least:.1g} only, so that a comparison proves nothing. Its weights are untrained, or the wrong ones: "
            "give trained weights, or leave out the check by --no-check (check=False)."
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


def _check_size(
    model: nn.Module,
    file: OnnxModel,
    size: tuple[int, int],
    batches: Sequence[int],
    tolerance: tuple[float, float],
    seed: int,
) -> list[CheckRow]:
    images = [random_images(file.spec, batch, size, seed + number) for number, batch in enumerate(batches)]
    expected = [outputs_of(model, inputs) for inputs in images]
    spreads = [_spread(torch.cat(outputs)) for outputs in zip(*expected)]
    rows: list[CheckRow] = []
    for inputs, outputs in zip(images, expected):
        rows += _compare(file, inputs, outputs, spreads, tolerance)
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
    file: OnnxModel,
    images: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    spreads: Sequence[float],
    tolerance: tuple[float, float],
) -> list[CheckRow]:
    reason = ""
    try:
        actual = file(*(image.numpy() for image in images))
    except InputError as problem:
        reason = str(problem).rstrip(".")
        actual = [np.empty(0)] * len(expected)
    rows = []
    batch, _, height, width = images[0].shape
    for name, reference, result, spread in zip(file.spec.output_names, expected, actual, spreads):
        why, errors = reason, (math.inf,) * batch
        if not why and result.shape != tuple(reference.shape):
            why = f"shape {result.shape} instead of {tuple(reference.shape)}"
        elif not why and spread < LEAST_SPREAD:
            why = f"the model's outputs for two images differ by {spread:.1g} only"
        elif not why and not math.isfinite(spread):
            why = "the model's own outputs are not finite"
        elif not why:
            errors = tuple(np.abs(result - reference.numpy()).reshape(batch, -1).max(1).tolist())
        allowed = tolerance[0] + tolerance[1] * spread
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
