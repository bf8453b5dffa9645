"""Compare an exported file with its model: ONNX Runtime against PyTorch, at several sizes and batches.

A Python branch on a size, or a pooling grid, is silently baked into a file and is correct at the export size only. A
file with dynamic axes is therefore always run at sizes that the export has not seen, one of which is not divisible by
any window or patch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from visionattn.errors import ExportError, InputError, require
from visionattn.export.images import check_sizes, frozen, outputs_of, random_images, scaled_size
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec, size_text

__all__ = ["TOLERANCE", "CheckRow", "check_onnx", "check_program", "check_sizes", "print_rows"]

# Largest accepted absolute error: the first number + the second x the spread of the reference over images.
TOLERANCE = (1e-6, 1e-4)

# Additional tolerance for rounding, in multiples of float32's epsilon at the largest output value: an output may be far
# from 0 and hardly vary over images.
ROUNDINGS = 16

# Fraction of an image's output values that may exceed the error if the model makes discrete decisions: rounding can
# flip one, which changes the values that depend on it. A mistake in the export affects far more of them.
OUTLIERS = 0.02

# Draws of images for a model that makes decisions: a flipped decision occurs in one of them, a mistake in all.
DRAWS = 4

# If the outputs of a model for two images are closer than this, the check proves nothing: any file would agree.
LEAST_SPREAD = 1e-4
_CONSTANT = "the model's outputs for two images differ by"


@dataclass(frozen=True)
class CheckRow:
    """One comparison. One that is impossible, or proves nothing, has an infinite error and a reason.

    `errors` has the largest error of each image; if the model makes decisions, without the fraction `OUTLIERS`.
    `spread` is the largest difference between the model's outputs for two images: how much an output depends on them.
    `rounding` is the error of PyTorch itself in float32, if it was computed.
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
        """The largest error over all images, NaN if any is."""
        return float(np.max(self.errors))

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        found = self.reason or f"error {self.error:.2g}, allowed {self.allowed:.2g}"
        found += f", PyTorch's own in float32 {self.rounding:.2g}" if self.rounding else ""
        return f"{self.output} at {size_text(self.height, self.width)}, batch {self.batch}: {found}"


def check_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    tolerance: tuple[float, float] = TOLERANCE,
) -> list[CheckRow]:
    """Compare an exported file in ONNX Runtime (CPU) with the model in PyTorch, on random images from a fixed seed.

    A model whose attribute `decides` is true is compared in float64: if rounding flips a decision, neither of two
    float32 results is the correct one.

    Args:
        model: The model that was exported. It is not changed.
        path: The file.
        sizes: Heights and widths. Default: `check_sizes` of what the file accepts.
        batches: Batch sizes. Default: 1 and 3, or the fixed one twice.
        tolerance: Absolute and relative part of the largest error that passes: `absolute + relative * spread`. The
            rounding of float32 is added to it (see `ROUNDINGS`).

    Returns:
        One row per output, size and batch; all have passed.

    Raises:
        ExportError: The file is malformed, or some rows fail; the message lists them.
        InputError: The file cannot be loaded, or the model itself fails at a size.
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
            f"The output of {spec.model} ({', '.join(names)}) hardly depends on the image: the outputs for two images "
            f"differ by only {least:.1g}, so that a comparison proves nothing. The weights are untrained or wrong: "
            "give trained weights, or skip the check with --no-check (check=False)."
        )
    if all(row.rounding > row.allowed for row in failed):
        raise ExportError(
            f"The output of {spec.model} is numerically unstable: in float32, PyTorch itself differs from float64 by "
            f"more than the check allows: {failed[0]}. Untrained weights can cause this: give trained weights, or skip "
            "the check with --no-check (check=False)."
        )
    text = f"The outputs of the exported file differ from those of the model in {len(failed)} of {len(rows)} checks: "
    first: dict[object, CheckRow] = {}
    for row in failed:
        first.setdefault(row.reason or row, row)  # report each reason once
    text += "; ".join(map(str, first.values())) + "."
    if spec.dynamic_size:
        text += (
            " Errors that grow with the distance from the export size come from a size baked in by a Python branch or "
            "by pooling to a grid; --static-size (dynamic_size=False) exports one fixed size."
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
    """Compare the outputs of `compute` for float32 images with those of the model, in the model's dtype."""
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
    """Merge the rows of two draws: the smaller error at each batch index, and the stricter tolerance."""
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
            # With a fraction of 0, this is the maximum; NaN stays NaN.
            errors = tuple(np.quantile(difference, 1 - share, axis=1, method="lower").tolist())
        allowed = tolerance[0] + tolerance[1] * spread + rounding
        rows.append(CheckRow(name, batch, height, width, errors, spread, allowed, why))
    return rows


def check_program(model: nn.Module, path: str | Path, spec: ExportSpec) -> list[CheckRow]:
    """Compare a program of torch.export with the model, on random images from a fixed seed.

    Raises:
        ExportError: Some rows fail; the message lists them.
        InputError: The model or the program fails at a size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the age of the format
        program = torch.export.load(path).module()
    rows = []
    height, width = spec.input_size[1:]
    sizes = [(height, width)]
    if spec.dynamic_size:  # not the minimum size: a program of torch.export fails if an inner axis becomes 1
        factors = ((1.6, 0.6), (0.6, 1.6))
        sizes += [(scaled_size(height, y, spec), scaled_size(width, x, spec)) for y, x in factors]
    for size in sizes:
        batch = spec.batch or 3
        images = random_images(spec, batch, size, seed=0)
        for name, expected, output in zip(spec.output_names, outputs_of(model, images), outputs_of(program, images)):
            spread = (expected - expected[:1]).abs().max().item() if batch > 1 else expected.abs().max().item()
            errors = (output - expected).abs().flatten(1).amax(1).tolist()
            rows.append(CheckRow(name, batch, *size, tuple(errors), spread, TOLERANCE[0] + TOLERANCE[1] * spread))
    failed = [str(row) for row in rows if not row.passed]
    if failed:
        raise ExportError(f"The outputs of the program differ from those of the model: {'; '.join(failed)}.")
    return rows


def print_rows(rows: Sequence[CheckRow], console: Console) -> None:
    """Print the rows of `check_onnx` as a table."""
    one_size = len({(row.height, row.width) for row in rows}) == 1
    table = Table(
        title="ONNX Runtime against PyTorch, random images",
        caption="The file has one fixed size; no other size was checked." if one_size else None,
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
