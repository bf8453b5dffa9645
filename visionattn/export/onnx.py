"""Export a PyTorch model to one ONNX file, with named dynamic axes for batch, height and width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from visionattn.errors import InputError, require, shorten
from visionattn.export.budget import TIME_LIMIT
from visionattn.export.part import Form, whole
from visionattn.export.spec import size_text
from visionattn.export.write import OnnxFile, write_parts

__all__ = ["OnnxFile", "check_input_size", "check_opset", "export_onnx"]

OLDEST_OPSET = 18
# The largest image used for tracing and checking.
MAX_PIXELS = 2**26


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int] | None = None,
    dynamic_size: bool | None = None,
    batch: int | None = None,
    opset: int = 20,
    weights: str = "not stated",
    license: str | None = None,
    pad_channels: bool = False,
    check: bool = True,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> OnnxFile:
    """Write a model as one float32 ONNX file and check it against PyTorch.

    Args:
        model: A classifier, backbone or any model that states its task (see `visionattn.export.spec`). Not changed.
        path: File to write.
        input_size: Height and width of a file of fixed size, and the size around which it is checked. Default: the
            model's.
        dynamic_size: Whether height and width are dynamic. Default: unless the model has a fixed input size.
        batch: Fixed batch size. Default: dynamic. Some runtimes, such as NNAPI, only take graphs without dynamic axes:
            fix the size too.
        opset: Version of the ONNX operator set. The file has the oldest IR version that allows it.
        weights: Origin of the weights, for the metadata.
        license: Licence of the weights, for the metadata.
        pad_channels: Pad the channels of convolutions with zero weights to a multiple of 4 (see
            `visionattn.export.pad`), which CPUs compute faster and browsers do not.
        check: Compare the file with the model before it is put in place (see `check_onnx`).
        time_limit: Maximum CPU time for tracing, translating and checking, in seconds. Sizes for which it does not
            suffice are not checked; the metadata list them as `unchecked`.
        progress: Called with a line at the start of each step, with an estimate of its time.

    Returns:
        The file with its metadata and the rows of its check.

    Raises:
        ExportError: The model cannot be exported in this form or in this time, not a single size can be checked in it,
            its weights are not finite, or the file's outputs differ from its own.
        InputError: The model does not accept the size, the operator set does not exist, or there are no channels to
            pad.
        StorageError: The file could not be written.
    """
    check_opset(opset)
    if input_size:
        check_input_size(*input_size)
    part = whole(model, path, Form(input_size, dynamic_size, opset, weights, license, batch))
    (file,) = write_parts([part], pad_channels=pad_channels, check=check, time_limit=time_limit, progress=progress)
    return file


def check_opset(opset: int) -> None:
    """Raise `InputError` for an operator set that the exporter cannot write."""
    onnx, *_ = (require(module, "export") for module in ("onnx", "onnxscript", "onnxruntime"))
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"The operator set must be from {OLDEST_OPSET} to {newest}; got {shorten(opset)}.")


def check_input_size(height: int, width: int) -> None:
    """Raise `InputError` for a size that is not supported for any model."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise InputError(
            f"The input size must be at least 1 x 1, with at most {MAX_PIXELS:,} pixels; got "
            f"{size_text(height, width)}."
        )
