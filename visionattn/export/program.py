"""Programs of torch.export, which AOTInductor, ExecuTorch and LiteRT compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from visionattn.export.budget import TIME_LIMIT
from visionattn.export.part import Form, whole
from visionattn.export.write import OnnxFile, write_parts

__all__ = ["write_program"]


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
        time_limit: See `export_onnx`.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: The model cannot be traced in this form, or the program's outputs differ from those of the model.
        InputError: The model does not accept the size.
        StorageError: The file could not be written.
    """
    part = whole(model, path, Form(input_size, dynamic_size, 20, weights, license, batch))
    (file,) = write_parts([part], check=check, time_limit=time_limit, progress=progress)
    return file
