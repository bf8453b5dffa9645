"""Variants of an exported file: lower precision, uint8 image inputs, other formats.

    F.onnx -> F.int8.onnx, F.fp16.onnx            --format ort: F.ort, F.int8.ort, F.fp16.ort

Each is compared with the float32 file on real data by its task's metric (`visionattn.export.quality`) before it is
written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from visionattn.errors import InputError, require, shorten
from visionattn.export.examples import LEAST, Example, check_task, load_examples
from visionattn.export.formats import find_format, write_ort
from visionattn.export.half import to_half
from visionattn.export.preprocess import with_preprocessing
from visionattn.export.quality import Quality, Runner, measure_quality, measure_speed
from visionattn.export.quantize import quantize
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec
from visionattn.files import atomic_path, check_output

__all__ = ["Variant", "check_data", "check_outputs", "print_variants", "variant_path", "write_variants"]

GAIN = 1.05  # smallest speed-up at which a variant is recommended
SMALLER = 0.75  # relative size below which a float16 variant is recommended


@dataclass(frozen=True)
class Variant:
    """A variant of an exported file, compared with the float32 file.

    Attributes:
        path: The file.
        spec: Its metadata.
        bytes: Its size; 0 if it was refused.
        quality: The metric of the float32 file and of this one; None if nothing was measured.
        speed: Speed-up over the float32 file with one thread on this processor: median of paired runs.
        spread: Half the interquartile range of `speed`.
        kept: Nodes left in float, since their quantisation loses too much.
        recommended: Whether it is faster or, for float16, smaller.
        refused: Why it was not written; empty if it was.
    """

    path: Path
    spec: ExportSpec
    bytes: int
    quality: Quality | None = None
    speed: float = 1.0
    spread: float = 0.0
    kept: tuple[str, ...] = ()
    recommended: bool = True
    refused: str = ""

    def describe(self) -> str:
        """One sentence: why it was refused, or its size and speed."""
        if self.refused:
            return f"{self.path.name} was not written: {self.refused}."
        text = f"{self.path.name}: {self.bytes / 1e6:.2f} MB, {self.speed:.2f} times the speed of float32 here"
        if self.kept:
            text += f", {len(self.kept)} layers in float ({shorten(', '.join(self.kept))})"
        return text + ("." if self.recommended else ": no gain on this processor, not recommended.")


def variant_path(path: str | Path, precision: str) -> Path:
    """The path of a variant of `F.onnx`, such as `F.int8.onnx`; "fp32" is the file itself."""
    path = Path(path)
    return path if precision == "fp32" else path.with_suffix(f".{precision}{path.suffix}")


def check_outputs(
    output: str | Path, *, int8: bool | str | Path = False, fp16: bool = False, overwrite: bool = False
) -> None:
    """Raise `InputError` if `write_variants` could not write its files (arguments: see there)."""
    if find_format(output) == "pt2":
        raise InputError(
            "A program of torch.export (.pt2) has no variants: leave out --int8, --fp16 and --preprocess, or write a "
            "file that ends in .onnx or .ort."
        )
    for precision in _precisions(int8, fp16)[1:]:
        check_output(variant_path(output, precision), overwrite)


def check_data(spec: ExportSpec, *, int8: bool | str | Path = False, test_data: str | Path | None = None) -> None:
    """Raise the errors of `write_variants` about a task or its real data (arguments: see there)."""
    check_task(spec)
    if int8:
        load_examples(spec, _folder(int8), LEAST[spec.task])
    if test_data is not None:
        load_examples(spec, test_data)


def _precisions(int8: bool | str | Path, fp16: bool) -> list[str]:
    return ["fp32", *(name for name, asked in (("int8", int8), ("fp16", fp16)) if asked)]


def _folder(int8: bool | str | Path) -> Path | None:
    return None if isinstance(int8, bool) else Path(int8)


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
    writes_first = output != source or preprocess
    if writes_first:
        check_output(output, overwrite)
    examples = load_examples(spec, _folder(int8) if test_data is None else test_data)
    tell = progress or (lambda line: None)
    with tempfile.TemporaryDirectory() as folder:
        writer = _Writer(source, spec, examples, preprocess, Path(folder), tell)
        first = writer.write(require("onnx", "export").load(source), "fp32", output if writes_first else None)
        rows = [first]
        for precision in _precisions(int8, fp16)[1:]:
            path = variant_path(output, precision)
            kept: tuple[str, ...] = ()
            if precision == "int8":
                tell("Quantising to int8.")
                calibrating = load_examples(spec, _folder(int8), LEAST[spec.task])
                made = quantize(source, spec, calibrating, Path(folder), tell)
                model, kept = made.model, made.kept
            else:
                tell("Converting to float16.")
                model = to_half(source)
            rows.append(replace(writer.write(model, precision, path), kept=kept))
    return tuple(rows)


class _Writer:
    """Writes the variants of one file, each after it was measured."""

    def __init__(
        self,
        source: Path,
        spec: ExportSpec,
        examples: Sequence[Example],
        preprocess: bool,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.source, self.spec, self.examples = source, spec, examples
        self.preprocess, self.folder, self.tell = preprocess, folder, tell
        self.runner = Runner(source, spec)
        self.smallest = min(examples, key=lambda example: example.images[0].size)
        self.reference = [self.runner(example) for example in examples]

    def write(self, model: Any, precision: str, path: Path | None) -> Variant:
        """Finish a graph, measure it and write it. Without a path, the source itself is reported as the reference."""
        if path is None:
            quality = measure_quality(self.spec, self.examples, self.reference, self.reference)
            return Variant(self.source, self.spec, self.source.stat().st_size, quality)
        model, spec = with_preprocessing(model, self.spec) if self.preprocess else (model, self.spec)
        spec = replace(spec, precision=precision)
        del model.graph.value_info[:]  # intermediate shapes, which quantisation adds
        del model.metadata_props[:]
        require("onnx", "export").helper.set_model_props(model, spec.to_metadata())
        file = self.folder / f"finished{path.suffix}"
        if path.suffix.lower() == ".ort":
            write_ort(model, file)
        else:
            file.write_bytes(model.SerializeToString())
        size = file.stat().st_size
        if precision == "fp32" and not self.preprocess and path.suffix.lower() != ".ort":
            quality = measure_quality(spec, self.examples, self.reference, self.reference)
            speed, spread = 1.0, 0.0  # the graph is the source's
        else:
            self.tell(f"Measuring {path.name} on {len(self.examples)} examples.")
            runner = Runner(file, spec)
            quality = measure_quality(spec, self.examples, self.reference, list(map(runner, self.examples)))
            if not quality.passed:
                return Variant(path, spec, 0, quality, recommended=False, refused=str(quality))
            speed, spread = measure_speed(self.runner, runner, self.smallest)
        with atomic_path(path) as temporary:
            temporary.write_bytes(file.read_bytes())
        gains = precision == "fp32" or speed >= GAIN or (precision == "fp16" and size < SMALLER * self._size())
        return Variant(path, spec, size, quality, speed, spread, recommended=gains)

    def _size(self) -> int:
        return self.source.stat().st_size


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
