"""Export a PyTorch model to one ONNX file, with named dynamic axes for batch, height and width.

Steps:

    torch.export with symbolic axes (`visionattn.export.trace`) -> ONNX exporter -> metadata -> check

The file is put in place only after the check has passed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from visionattn.errors import ExportError, InputError, require, shorten
from visionattn.export.check import CheckRow, check_onnx, check_sizes, frozen, outputs_of, random_images, scaled_size
from visionattn.export.spec import ExportSpec, size_text
from visionattn.export.trace import TIME_LIMIT, trace
from visionattn.files import atomic_path

__all__ = ["OnnxFile", "check_input_size", "check_opset", "export_onnx"]

AXES = {0: "batch", 2: "height", 3: "width"}
# A protobuf message, and so a file that contains its own weights, is limited to 2 GiB; the graph needs some of it.
MAX_WEIGHT_BYTES = 2**31 - 2**24
OLDEST_OPSET = 18
# The largest image used for tracing and checking.
MAX_PIXELS = 2**26


@dataclass(frozen=True)
class OnnxFile:
    """An exported file.

    Attributes:
        path: The file.
        spec: Its metadata.
        nodes: Number of operators in its graph.
        bytes: Its size.
        seconds: Duration of the export, including the check.
        rows: The rows of the check; empty without a check.
        variants: The files that `visionattn.export` wrote, this one first, each with its quality and speed (see
            `visionattn.export.variants.Variant`); empty without variants.
    """

    path: Path
    spec: ExportSpec
    nodes: int
    bytes: int
    seconds: float
    rows: list[CheckRow]
    variants: tuple[Any, ...] = ()


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
    check: bool = True,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> OnnxFile:
    """Write a model as one float32 ONNX file and check it against PyTorch.

    Args:
        model: A classifier, backbone or any model that states its task (see `visionattn.export.spec`). Not changed.
        path: File to write.
        input_size: Height and width of a file of fixed size, and the first size of the check. Default: the model's.
        dynamic_size: Whether height and width are dynamic. Default: unless the model has a fixed input size.
        batch: Fixed batch size. Default: dynamic. Some runtimes, such as NNAPI, only take graphs without dynamic axes:
            fix the size too.
        opset: Version of the ONNX operator set. The file has the oldest IR version that allows it.
        weights: Origin of the weights, for the metadata.
        license: Licence of the weights, for the metadata.
        check: Compare the file with the model before it is put in place (see `check_onnx`).
        time_limit: Maximum CPU time for tracing, in seconds.
        progress: Called with a line at the start of each step, with an estimate of its time.

    Returns:
        The file with its metadata and the rows of its check.

    Raises:
        ExportError: The model cannot be exported in this form or in this time, its weights are not finite, or the
            file's outputs differ from its own.
        InputError: The model does not accept the size, or the operator set does not exist.
        StorageError: The file could not be written.
    """
    check_opset(opset)
    if batch is not None and batch < 1:
        raise InputError(f"The batch must be at least 1; got {batch}.")
    if input_size:
        check_input_size(*input_size)
    tell, steps = progress or (lambda line: None), 3 if check else 2
    start = time.perf_counter()
    model = frozen(model)
    _check_finite(model)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_WEIGHT_BYTES:
        raise ExportError(f"The weights take {size / 1e9:.1f} GB; a single ONNX file must be smaller than 2.1 GB.")
    spec = ExportSpec.of(model, input_size, dynamic_size, opset, weights, license, batch)
    with atomic_path(path) as temporary:
        names = {axis: name for axis, name in AXES.items() if name in spec.dynamic_axes}
        tell(f"Exporting {spec.model}, step 1 of {steps}: tracing, usually a few seconds, at most {time_limit:.0f} s.")
        traced = _trace(model, spec, time_limit)
        seconds = time.perf_counter() - start  # translating takes 0.4 to 1.3 times as long as tracing
        tell(f"Step 2 of {steps}: translating {len(traced.graph.nodes):,} operations, about {1.3 * seconds:.0f} s.")
        program = translate(traced, spec, [names] * len(spec.input_names))
        program.save(str(temporary), external_data=False)
        if check:
            tell(f"Step 3 of {steps}: comparing the file with PyTorch at {len(check_sizes(spec))} sizes.")
        rows = check_onnx(model, temporary) if check else []
        bytes_written = temporary.stat().st_size
    nodes = len(program.model.graph)
    return OnnxFile(Path(path), spec, nodes, bytes_written, time.perf_counter() - start, rows)


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


def _check_finite(model: nn.Module) -> None:
    # Buffers may be masks, which contain infinities.
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    wrong += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ExportError(
            f"The weights contain values that are not finite: {shorten(wrong[0])}{more}. Train the model again."
        )


def _trace(model: nn.Module, spec: ExportSpec, time_limit: float) -> ExportedProgram:
    """Trace with a batch, height and width that are not special cases: not 1, native, square or a multiple of a window.

    A traced branch is then that of the general case, such as non-zero padding. The sizes are larger than the native
    ones: the tracer treats a size of 1, such as the number of windows of a small map, as constant.
    """
    height, width = spec.input_size[1:]
    if spec.dynamic_size:
        height, width = scaled_size(height, 1.25, spec), scaled_size(width, 1.5, spec)
    images = random_images(spec, spec.batch or 2, (height, width), seed=0)
    outputs = len(outputs_of(model, images))
    if outputs != len(spec.output_names):
        raise ExportError(
            f"{spec.model} returns {outputs} outputs, but has the output names {', '.join(spec.output_names)}. "
            "Set its attribute `output_names` to one name per output."
        )
    dims: dict[int, Any] = {0: Dim.DYNAMIC} if spec.batch is None else {}
    if spec.dynamic_size and spec.size_multiple == 1:
        dims |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    elif spec.dynamic_size:
        # Declaring a size as a multiple avoids branches on remainders, which the tracer could not resolve.
        least = max(1, (spec.size_minimum or 1) // spec.size_multiple)
        dims |= {axis: spec.size_multiple * Dim(f"{AXES[axis]}_units", min=least) for axis in (2, 3)}
    try:
        return trace(model, images, [dims for _ in images], time_limit)
    # The tracer raises whatever the traced code raises, and many exceptions of its own.
    except Exception as error:
        raise refusal("torch.export", spec, error) from error


def translate(program: ExportedProgram, spec: ExportSpec, axes: Sequence[dict[int, str]]) -> Any:
    """Translate to ONNX (a `torch.onnx.ONNXProgram`) and write the metadata.

    Args:
        program: The traced model, without operators of this package.
        spec: The metadata.
        axes: The names of each input's dynamic axes.

    Raises:
        ExportError: The exporter fails.
    """
    onnx = require("onnx", "export")
    clear = require("onnx_ir.passes.common", "export").ClearMetadataAndDocStringPass()
    try:
        with warnings.catch_warnings():
            # Two inputs share their axes, which makes the exporter warn once per axis.
            warnings.filterwarnings("ignore", message="# The axis name")
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=spec.opset,
                input_names=spec.input_names,
                output_names=spec.output_names,
                dynamic_shapes=tuple(axes),
                verbose=False,
            )
    # The exporter wraps whatever its translation functions raise.
    except Exception as error:
        raise refusal("The ONNX exporter", spec, error) from error
    model = translated.model
    if model.opset_imports[""] != spec.opset:
        raise ExportError(
            f"The exporter wrote operator set {model.opset_imports['']} instead of the requested {spec.opset}: leave "
            "out --opset (opset=)."
        )
    # The exporter stores the stack trace of every node: local paths, and a third of a small file.
    clear(model)
    # The exporter writes its newest IR version, which older runtimes reject whatever the file contains.
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", spec.opset)])
    model.metadata_props.update(spec.to_metadata())
    return translated


def refusal(who: str, spec: ExportSpec, error: Exception) -> ExportError:
    """The error to raise when a tool cannot export a model: tool, model, reason and remedy."""
    size = size_text(*spec.input_size[1:])
    dynamic = f" with dynamic {', '.join(spec.dynamic_axes)}" if spec.dynamic_axes else ""
    text = f"{who} cannot export {spec.model}{dynamic}. Reason: {_reason(error)}"
    if spec.dynamic_size:
        text += f" To export one fixed size ({size}) instead, use --static-size (dynamic_size=False)."
    return ExportError(text)


def _reason(error: BaseException) -> str:
    """The lines of an exporter's long message that state the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([line for line in lines if line.startswith("- ")][:3] or lines[:1])
