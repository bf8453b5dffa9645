"""Variants of an exported file: lower precision, uint8 image inputs, other formats.

    F.onnx -> F.int8.onnx, F.fp16.onnx            --format ort: F.ort, F.int8.ort, F.fp16.ort

Each is compared with the float32 file on real data before it is written (`visionattn.export.variant`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from visionattn.errors import InputError, require, shorten
from visionattn.export.examples import RealData, check_task, load_data
from visionattn.export.fitting import Example
from visionattn.export.formats import find_format
from visionattn.export.half import to_half
from visionattn.export.quality import Reference
from visionattn.export.quantize import quantize
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec
from visionattn.export.variant import Variant, write_variant
from visionattn.files import check_output

__all__ = ["Variant", "check_outputs", "print_variants", "variant_path", "write_measured", "write_variants"]


def variant_path(path: str | Path, precision: str) -> Path:
    """The path of a variant of `F.onnx`, such as `F.int8.onnx`; "fp32" is the file itself."""
    path = Path(path)
    return path if precision == "fp32" else path.with_suffix(f".{precision}{path.suffix}")


def variant_paths(output: str | Path, int8: Any, fp16: bool) -> dict[str, Path]:
    """The files by precision, the float32 file first."""
    precisions = ["fp32"] + ["int8"] * bool(int8) + ["fp16"] * fp16
    return {precision: variant_path(output, precision) for precision in precisions}


def check_outputs(
    output: str | Path, *, int8: bool | str | Path = False, fp16: bool = False, overwrite: bool = False
) -> None:
    """Raise `InputError` if `write_variants` could not write its files (arguments: see there)."""
    if find_format(output) == "pt2":
        raise InputError(
            "A program of torch.export (.pt2) has no variants: leave out --int8, --fp16 and --preprocess, or write a "
            "file that ends in .onnx or .ort."
        )
    for path in list(variant_paths(output, int8, fp16).values())[1:]:
        check_output(path, overwrite)


def write_variants(
    source: str | Path,
    output: str | Path | None = None,
    *,
    int8: bool | str | Path = False,
    fp16: bool = False,
    preprocess: bool = False,
    test_data: str | Path | Sequence[Example] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[Variant, ...]:
    """Write variants of an exported float32 file; each is measured on real data before it is written.

    Args:
        source: A float32 file written by `visionattn export`.
        output: File ending in .onnx or .ort, after which the variants are named. The float32 file is written to it in
            that format, with preprocessing if `preprocess`. Default: `source`, which is then not changed.
        int8: Write int8: True calibrates on images from installed packages, a path on those in that folder.
        fp16: Write float16 with float32 inputs and outputs.
        preprocess: All files take uint8 images (B, H, W, C) and return images, probabilities or disparities.
        test_data: Real data to measure on: a folder of high-resolution images, class folders or stereo scenes, or the
            examples themselves. Default: the calibration data.
        overwrite: Replace existing files.
        progress: Called with a line at the start of each step.

    Returns:
        One per file, the float32 file first. Variants that exceed their allowed loss are not written; see `refused`.

    Raises:
        InputError: The source is not a float32 file of this package, or an output exists.
        DataError: There are too few calibration images.
        StorageError: A file could not be written.
    """
    source = Path(source)
    output = source if output is None else Path(output)
    check_outputs(output, int8=int8, fp16=fp16, overwrite=overwrite)
    spec = OnnxModel(source).spec
    if spec.precision not in (None, "fp32") or spec.input_type == "uint8":
        raise InputError(f"{shorten(source)} is itself a variant: give the float32 file that it was made from.")
    check_task(spec)
    if output != source or preprocess:
        check_output(output, overwrite)
    data = load_data(spec, int8, test_data)
    return write_measured(source, spec, output, data, fp16=fp16, preprocess=preprocess, progress=progress)


def write_measured(
    source: Path,
    spec: ExportSpec,
    output: Path,
    data: RealData,
    *,
    fp16: bool,
    preprocess: bool,
    progress: Callable[[str], None] | None,
) -> tuple[Variant, ...]:
    """Write variants of a float32 file with data that is already read (see `write_variants`).

    Args:
        source: The float32 file.
        spec: Its metadata.
        output: File after which the variants are named.
        data: Examples to measure on, and those for the calibration of int8, which is written if there are any.
        fp16: See `write_variants`, also for the following arguments.
        preprocess: All files take uint8 images.
        progress: Called with a line at the start of each step.
    """
    tell = progress or (lambda line: None)
    paths = variant_paths(output, data.calibration, fp16)
    reference = Reference(source, spec, data.test)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision, path in paths.items():
            kept: tuple[str, ...] = ()
            if precision == "fp32":
                if path == source and not preprocess:
                    rows.append(Variant(source, spec, reference.bytes, reference.quality))
                    continue
                model = require("onnx", "export").load(source)
            elif precision == "int8":
                tell("Quantising to int8.")
                made = quantize(source, spec, data.calibration, Path(folder), tell)
                model, kept = made.model, made.kept
            else:
                tell("Converting to float16.")
                model = to_half(source)
            rows.append(write_variant(model, spec, precision, path, reference, preprocess, kept, tell))
    return tuple(rows)


def print_variants(variants: Sequence[Variant], console: Console) -> None:
    """Print the variants as a table, then one line about each."""
    table = Table(title="Variants compared with the float32 file, on real data")
    for header in ("file", "kB", "metric", "float32", "this", "loss", "speed", ""):
        table.add_column(header, justify="left" if header in ("file", "metric", "") else "right")
    for variant in variants:
        quality = variant.quality
        numbers = [f"{quality.reference:.5g}", f"{quality.value:.5g}", f"{quality.loss:.2g}"] if quality else [""] * 3
        table.add_row(
            variant.path.name,
            "" if variant.refused else f"{variant.bytes / 1000:,.0f}",
            quality.metric if quality else "",
            *numbers,
            "" if variant.refused else f"x{variant.speed:.2f}",
            "REFUSED" if variant.refused else "pass",
        )
    console.print(table)
    for variant in variants:
        console.print(variant.describe())
