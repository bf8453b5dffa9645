"""Formats of exported files: ONNX, ONNX Runtime's own format, which loads faster, and programs of torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionattn.errors import ExportError, InputError, require, shorten
from visionattn.export.spec import ExportSpec

__all__ = ["FORMATS", "find_format", "quiet", "set_metadata", "write_model"]

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


def set_metadata(model: Any, spec: ExportSpec) -> None:
    """Replace the metadata of an `onnx.ModelProto`."""
    del model.metadata_props[:]
    require("onnx", "export").helper.set_model_props(model, spec.to_metadata())


def write_model(model: Any, spec: ExportSpec, path: Path) -> None:
    """Write an `onnx.ModelProto` with its metadata: as ONNX or, if the path ends in .ort, in ONNX Runtime's format.

    The latter is optimised for no specific processor.

    Raises:
        ExportError: ONNX Runtime cannot convert it.
    """
    del model.graph.value_info[:]  # intermediate shapes, which quantisation adds
    set_metadata(model, spec)
    if path.suffix.lower() != ".ort":
        path.write_bytes(model.SerializeToString())
        return
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
