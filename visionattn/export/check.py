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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import ExportError, InputError
from visionattn.export.rows import CheckRow, print_rows
from visionattn.export.runtime import OnnxModel, open_exported
from visionattn.export.spec import ExportSpec, size_text

__all__ = [
    "TOLERANCE",
    "CheckRow",
    "check_file",
    "check_onnx",
    "check_program",
    "check_retrieval",
    "check_sizes",
    "frozen",
    "outputs_of",
    "print_rows",
    "random_images",
    "scaled_size",
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

# Largest accepted absolute error of an embedding, whose length is 1.
EMBEDDING_TOLERANCE = 1e-4

# Batch sizes of the check of embeddings.
BATCHES = (1, 3, 4)

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


def scaled_size(size: int, factor: float, spec: ExportSpec) -> int:
    """An accepted size near `factor * size`: a prime if any size is accepted, since no window or patch divides it."""
    size = max(round(factor * size), spec.size_minimum or 1, 2)
    if spec.size_multiple > 1:
        return spec.size_multiple * math.ceil(size / spec.size_multiple)
    while any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        size += 1
    return size


def check_sizes(spec: ExportSpec) -> list[tuple[int, int]]:
    """The sizes at which a file is checked: its own and, if it is dynamic, two very different ones.

    One is taller than wide and, if any size is accepted, not a multiple of any window; the other is the stated
    minimum, or wider than tall if none is stated.
    """
    height, width = spec.input_size[1:]
    if not spec.dynamic_size:
        return [(height, width)]
    tall = scaled_size(height, 1.6, spec), scaled_size(width, 0.6, spec)
    wide = scaled_size(height, 0.6, spec), scaled_size(width, 1.6, spec)
    minimum = spec.size_minimum or min(height, width)
    return [(height, width), tall, (minimum, minimum) if minimum < min(height, width) else wide]


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
    return check_file(model, open_exported(path), sizes, batches, tolerance)


def check_file(
    model: nn.Module,
    file: OnnxModel,
    sizes: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    tolerance: tuple[float, float] = TOLERANCE,
) -> list[CheckRow]:
    """Compare an opened file with the model (see `check_onnx`)."""
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


def check_program(model: nn.Module, program: nn.Module, spec: ExportSpec) -> list[CheckRow]:
    """Compare a program of torch.export with the model, on random images from a fixed seed.

    Raises:
        ExportError: Some rows fail; the message lists them.
        InputError: The model or the program fails at a size.
    """
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


def check_retrieval(model: Any, tower: OnnxModel, head: OnnxModel) -> list[CheckRow]:
    """Compare a pair in ONNX Runtime with the model in PyTorch, from random images to embeddings.

    Args:
        model: The model that was exported. It is not changed.
        tower: One file.
        head: The other.

    Returns:
        One row per size (those of the tower's check), batch size (three, or the fixed one twice) and number of
        attributes (1, 3 and all; repeated if there are fewer); all have passed.

    Raises:
        ExportError: Some rows fail; the message lists them.
    """
    model = frozen(model)
    count, rows = len(model.attributes), []
    counts = BATCHES if tower.spec.batch is None else (tower.spec.batch,) * 2
    for size in check_sizes(tower.spec):
        batches = [random_images(tower.spec, batch, size, seed)[0] for seed, batch in enumerate(counts)]
        every = [outputs_of(model, [images])[0] for images in batches]  # (B, C, E) each
        found = [tower(images.numpy())[0] for images in batches]
        spread = (torch.cat(every) - every[0][:1]).abs().max().item()
        why = "" if spread >= LEAST_SPREAD else "the model's embeddings of two images are equal: load trained weights"
        for number in dict.fromkeys((1, 3, count)):
            ids = np.arange(count - number, count) % count
            for expected, tokens in zip(every, found):
                actual = head.compute({"tokens": tokens, "conditions": ids})[0]
                error = float(np.abs(actual - expected[:, torch.from_numpy(ids)].numpy()).max())
                name = f"embeddings, {number} of {count} attributes"
                errors = (float("inf") if why else error,)
                rows.append(CheckRow(name, len(tokens), *size, errors, spread, EMBEDDING_TOLERANCE, why))
    failed = [row for row in rows if not row.passed]
    if failed:
        raise ExportError(
            f"The outputs of tower and head differ from those of the model in {len(failed)} of {len(rows)} checks: "
            + "; ".join(map(str, failed))
            + "."
        )
    return rows
