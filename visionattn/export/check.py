"""Compare an exported file with its model: ONNX Runtime against PyTorch, at several sizes and batches.

A Python branch on a size, or a pooling grid, is silently baked into a file and is correct at the export size only. A
file with dynamic axes is therefore always run at sizes that the export has not seen, one of which is not divisible by
any window or patch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import ExportError, InputError
from visionattn.export.budget import Budget, TimeLimitError
from visionattn.export.rows import CheckRow, print_rows
from visionattn.export.runtime import OnnxModel, open_exported
from visionattn.export.schedule import Checked, Schedule
from visionattn.export.sizes import check_sizes
from visionattn.export.spec import ExportSpec, size_text

__all__ = [
    "TOLERANCE",
    "CheckRow",
    "check_file",
    "check_onnx",
    "frozen",
    "outputs_of",
    "print_rows",
    "random_images",
]

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


def frozen(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode; the caller's model keeps its mode, dtype and device."""
    return copy.deepcopy(model).eval().to("cpu", torch.float32).requires_grad_(False)


def outputs_of(model: nn.Module, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run the model in PyTorch; a single output is returned as a sequence of one.

    Raises:
        InputError: The model itself does not accept these images.
    """
    try:
        with torch.no_grad():
            outputs = model(*images)
    # Each layer may reject a size with another type of exception.
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} itself fails in PyTorch at {size_text(*images[0].shape[2:])}: {error} "
            "If it takes only one size, export that size with --static-size (dynamic_size=False); if it takes "
            "multiples of a number, set its attribute `size_multiple`."
        ) from error
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def random_images(spec: ExportSpec, batch: int, size: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """One batch of images per input, in the input range, normalised as stated in the file's metadata.

    Like photographs, the images vary at all scales: each is the mean of noise on the pixel grid, on a grid half as
    fine, and so on. On white noise, the activations of a network trained on photographs may explode, so that outputs
    differ by rounding alone.

    Several inputs are views of one scene, each image shifted horizontally by a few pixels of its own. Without true
    matches, the comparison would depend on which of many wrong matches rounding prefers.
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
    """A size, half of it, and so on, while both sides have a pixel."""
    height, width = size
    return [(height >> level, width >> level) for level in range(min(size).bit_length())]


def check_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    tolerance: tuple[float, float] = TOLERANCE,
    progress: Callable[[str], None] | None = None,
) -> list[CheckRow]:
    """Compare an exported file in ONNX Runtime (CPU) with the model in PyTorch, on random images from a fixed seed.

    Small sizes are compared first; the first at which the file differs ends the check.

    A model whose attribute `decides` is true is compared in float64: if rounding flips a decision, neither of two
    float32 results is the correct one.

    Args:
        model: The model that was exported. It is not changed.
        path: The file.
        sizes: Heights and widths. Default: `check_sizes` of what the file accepts.
        batches: Batch sizes. Default: 1 and 3, or the fixed one twice.
        tolerance: Absolute and relative part of the largest error that passes: `absolute + relative * spread`. The
            rounding of float32 is added to it (see `ROUNDINGS`).
        progress: Called with a line for each size, and every ten seconds.

    Returns:
        One row per output, size and batch; all have passed.

    Raises:
        ExportError: The file is malformed, or some rows fail; the message lists them.
        InputError: The file cannot be loaded, there is nothing to compare, or the model itself fails at a size.
    """
    return check_file(model, open_exported(path), Budget(tell=progress), sizes, batches, tolerance).rows


def check_file(
    model: nn.Module,
    file: OnnxModel,
    budget: Budget,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    tolerance: tuple[float, float] = TOLERANCE,
) -> Checked:
    """Compare an opened file with the model within a time limit (see `check_onnx`)."""
    model, spec = frozen(model), file.spec
    if batches is None:
        batches = (spec.batch or 1, spec.batch or 3)
    sizes = check_sizes(spec) if sizes is None else sizes
    if not sizes or not batches or min(batches) < 1:
        raise InputError(f"A check needs a size and batches of at least 1; got {list(sizes)} and {list(batches)}.")
    for size in sizes:
        spec.check_size(*size)
    schedule = Schedule(sizes, batches, budget)
    check = _Check(model, file, schedule, tolerance)
    return schedule.run(spec.model, check.compare, lambda rows: _raise_for(rows, spec))


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
            " One cause is a size baked in by a Python branch or by pooling to a grid: --static-size "
            "(dynamic_size=False) exports one fixed size."
        )
    raise ExportError(text)


class _Case(NamedTuple):
    """A batch of images per input, the model's outputs for it, and the file's, or why there are none."""

    images: list[torch.Tensor]
    expected: tuple[torch.Tensor, ...]
    actual: Sequence[np.ndarray] | str


class _Check:
    """The comparison of a file with a model in evaluation mode."""

    def __init__(self, model: nn.Module, file: OnnxModel, schedule: Schedule, tolerance: tuple[float, float]) -> None:
        self.model, self.file, self.schedule, self.tolerance = model, file, schedule, tolerance
        self.decides = getattr(model, "decides", False)
        self.reference = copy.deepcopy(model).double() if self.decides else model

    def compare(self, size: tuple[int, int]) -> list[CheckRow]:
        """Compare at a size; where rounding can decide, on other images too, until the outputs agree on some."""
        first = self._compute(size, 0)
        best = self._rows(first)
        for draw in range(1, DRAWS if self.decides else 1):
            if all(row.passed for row in best):
                return best
            try:
                found = self._rows(self._compute(size, draw))
            except TimeLimitError:
                failed = next(row for row in best if not row.passed)
                raise ExportError(
                    f"The outputs of the exported file differ from those of {self.file.spec.model}: {failed}. Rounding "
                    "can be the cause, and the time limit leaves no time to try other images: raise it with "
                    "--time-limit (time_limit=)."
                ) from None
            best = [_better(*pair) for pair in zip(best, found)]
        if self.decides and not all(row.passed for row in best):
            with suppress(TimeLimitError):
                own = self._rows(self._in_float32(size, first))
                best = [dataclasses.replace(row, rounding=other.error) for row, other in zip(best, own)]
        return best

    def _compute(self, size: tuple[int, int], draw: int) -> list[_Case]:
        """Compute model and file for one batch of images of each batch size."""
        dtype = next((parameter.dtype for parameter in self.reference.parameters()), torch.float32)
        batches, cases = self.schedule.batches, []
        for number, batch in enumerate(batches):
            with self.schedule.comparing(size, number, f", other images ({draw + 1} of {DRAWS})" if draw else ""):
                images = random_images(self.file.spec, batch, size, seed=draw * len(batches) + number)
                expected = outputs_of(self.reference, [image.to(dtype) for image in images])
                cases.append(_Case(images, expected, _outputs_or_reason(self.file, images)))
        return cases

    def _in_float32(self, size: tuple[int, int], cases: Sequence[_Case]) -> list[_Case]:
        """The cases with the outputs of the model in float32 in place of the file's."""

        def compute(*arrays: np.ndarray) -> list[np.ndarray]:
            return [output.numpy() for output in outputs_of(self.model, [torch.from_numpy(one) for one in arrays])]

        found = []
        for number, case in enumerate(cases):
            with self.schedule.comparing(size, number, ", PyTorch in float32"):
                found.append(case._replace(actual=_outputs_or_reason(compute, case.images)))
        return found

    def _rows(self, cases: Sequence[_Case]) -> list[CheckRow]:
        """Compare the outputs of all batches at a size, by the spread of the model's."""
        together = [torch.cat(outputs) for outputs in zip(*(case.expected for case in cases))]
        scales = [(_spread(outputs), outputs.abs().max().item()) for outputs in together]
        share = OUTLIERS if self.decides else 0.0
        return [row for case in cases for row in _compare(case, self.file.spec, scales, self.tolerance, share)]


def _outputs_or_reason(
    compute: Callable[..., Sequence[np.ndarray]], images: Sequence[torch.Tensor]
) -> Sequence[np.ndarray] | str:
    try:
        return compute(*(image.numpy() for image in images))
    except InputError as problem:
        return str(problem).rstrip(".")


def _better(one: CheckRow, other: CheckRow) -> CheckRow:
    """Merge the rows of two draws: the smaller error at each batch index, and the stricter tolerance."""
    if one.reason or other.reason:
        return other if one.reason else one
    strict = min(one, other, key=lambda row: row.allowed)
    return dataclasses.replace(strict, errors=tuple(np.fmin(one.errors, other.errors).tolist()))


def _spread(outputs: torch.Tensor) -> float:
    return (outputs - outputs[:1]).abs().max().item() if len(outputs) > 1 else outputs.abs().max().item()


def _compare(
    case: _Case,
    spec: ExportSpec,
    scales: Sequence[tuple[float, float]],
    tolerance: tuple[float, float],
    share: float,
) -> list[CheckRow]:
    reason = case.actual if isinstance(case.actual, str) else ""
    actual = [np.empty(0)] * len(case.expected) if isinstance(case.actual, str) else case.actual
    rows = []
    batch, _, height, width = case.images[0].shape
    for name, reference, result, (spread, largest) in zip(spec.output_names, case.expected, actual, scales):
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
