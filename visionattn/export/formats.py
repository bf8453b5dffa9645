"""Formats other than ONNX: ONNX Runtime's own format, which loads faster, and programs of torch.export."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn.errors import ExportError, InputError, require, shorten
from visionattn.export import onnx as onnx_files
from visionattn.export.check import TOLERANCE, CheckRow, frozen, outputs_of, random_images, scaled_size
from visionattn.export.onnx import OnnxFile
from visionattn.export.spec import ExportSpec
from visionattn.export.trace import TIME_LIMIT
from visionattn.files import atomic_path

__all__ = ["FORMATS", "find_format", "quiet", "write_ort", "write_program"]

FORMATS = ("onnx", "ort", "pt2")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence ONNX Runtime's Python tools, which print, and log advice that is already followed here."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def find_format(output: str | Path, format: str | None = None) -> str:
    """The format of an output by its suffix.

    Raises:
        InputError: The suffix belongs to no format, or to another than the requested one.
    """
    suffix = Path(output).suffix.lower().removeprefix(".")
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(map(repr, FORMATS))}; got {shorten(format)!r}.")
    if suffix not in FORMATS:
        endings = [f".{format}"] if format else [f".{name}" for name in FORMATS]
        raise InputError(f"Cannot write {shorten(output)}: the file name must end in {' or '.join(endings)}.")
    if format not in (None, suffix):
        raise InputError(
            f"{shorten(output)} must end in .{format} for this format: rename it, or leave out --format (format=)."
        )
    return suffix


def write_ort(model: Any, path: Path) -> None:
    """Write an `onnx.ModelProto` in ONNX Runtime's format, optimised for no specific processor.

    Raises:
        ExportError: ONNX Runtime cannot convert it.
    """
    tools = require("onnxruntime.tools.convert_onnx_models_to_ort", "export")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(model.SerializeToString())
        try:
            with quiet():
                tools.convert_onnx_models_to_ort(source, optimization_styles=[tools.OptimizationStyle.Fixed])
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot convert the model to its format: {shorten(error, 300)}") from error
        path.write_bytes(source.with_suffix(".ort").read_bytes())


def write_program(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int] | None = None,
    dynamic_size: bool | None = None,
    batch: int | None = None,
    weights: str = "not stated",
    license: str | None = None,
    check: bool = True,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> OnnxFile:
    """Write a program of torch.export without operators of this package, and check it against the model.

    `torch.export.load` opens it without this package, and AOTInductor, ExecuTorch and LiteRT compile it. Its metadata
    is JSON in the embedded file `visionattn.json` (`extra_files`).

    Args:
        model: See `export_onnx`, also for the following arguments.
        path: File to write.
        input_size: Height and width of a file of fixed size.
        dynamic_size: Whether height and width are dynamic.
        batch: Fixed batch size.
        weights: Origin of the weights.
        license: Licence of the weights.
        check: Compare the program with the model before the file is put in place.
        time_limit: Maximum CPU time for tracing, in seconds.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: The model cannot be traced in this form, or the program's outputs differ from those of the model.
        InputError: The model does not accept the size.
        StorageError: The file could not be written.
    """
    tell, start = progress or (lambda line: None), time.perf_counter()
    model = frozen(model)
    spec = ExportSpec.of(model, input_size, dynamic_size, 20, weights, license, batch)
    tell(f"Exporting {spec.model}, step 1 of {2 if check else 1}: tracing; large networks take minutes.")
    program = onnx_files._trace(model, spec, time_limit)
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the format
            torch.export.save(program, temporary, extra_files={"visionattn.json": json.dumps(spec.to_metadata())})
            loaded = torch.export.load(temporary).module()
        if check:
            tell("Step 2 of 2: comparing the program with the model.")
        rows = _check(model, loaded, spec) if check else []
        size = temporary.stat().st_size
    return OnnxFile(Path(path), spec, len(program.graph.nodes), size, time.perf_counter() - start, rows)


def _check(model: nn.Module, program: nn.Module, spec: ExportSpec) -> list[CheckRow]:
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
