"""From a PyTorch model to one ONNX file, with batch, height and width dynamic by name.

The way of a model:

    torch.export with symbolic axes (`visionattn.export.trace`) -> ONNX exporter -> metadata -> check

The file appears under its name only when the check has passed.
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
# A protobuf message, and so a file that holds its own weights, ends at 2 GiB; the graph needs a little of it.
MAX_WEIGHT_BYTES = 2**31 - 2**24
OLDEST_OPSET = 18
# The largest image that a model is traced and checked with.
MAX_PIXELS = 2**26


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: The file.
        spec: The metadata in it.
        nodes: Operators in its graph.
        bytes: Its size.
        seconds: Time that the export took, the check included.
        rows: The rows of the check; empty if none was asked for.
        variants: The files that `visionattn.export` wrote, this one first, each with its quality and speed (see
            `visionattn.export.variants.Variant`); empty if none was asked for.
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
        path: Where the file shall stand.
        input_size: Height and width of a file of fixed size, and the first size of the check. Default: the model's.
        dynamic_size: Whether height and width are dynamic. Default: unless the model has a fixed input size.
        batch: Fix the number of images at a time. Default: dynamic. Some runtimes, NNAPI among them, take only graphs
            in which nothing is dynamic: fix the size too.
        opset: Version of the ONNX operator set. The file has the oldest IR version that allows it.
        weights: Where the weights come from, as the file's metadata shall say: a model does not know that.
        license: Licence of the weights, for the metadata.
        check: Compare the file with the model before it appears (see `check_onnx`).
        time_limit: Seconds of CPU time after which tracing is given up.
        progress: Called with a line at the beginning of each step, which estimates the time that remains.

    Returns:
        What was written.

    Raises:
        ExportError: The model cannot be exported in this form or in this time, its weights are not finite, or the file
            computes something else.
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
        raise ExportError(f"The weights take {size / 1e9:.1f} GB; a single ONNX file holds less than 2.1 GB.")
    spec = ExportSpec.of(model, input_size, dynamic_size, opset, weights, license, batch)
    with atomic_path(path) as temporary:
        names = {axis: name for axis, name in AXES.items() if name in spec.dynamic_axes}
        tell(f"Exporting {spec.model}, step 1 of {steps}: tracing, {time_limit:.0f} s at most; most take some seconds.")
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
    """Raise `InputError` for an operator set that the exporter does not write."""
    onnx, *_ = (require(module, "export") for module in ("onnx", "onnxscript", "onnxruntime"))
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"The operator set is {shorten(opset)}; the exporter writes {OLDEST_OPSET} to {newest}.")


def check_input_size(height: int, width: int) -> None:
    """Raise `InputError` for a size that no model can be exported at."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise InputError(
            f"The input size is {size_text(height, width)}; height and width must be at least 1, with at most "
            f"{MAX_PIXELS:,} pixels in all."
        )


def _check_finite(model: nn.Module) -> None:
    # Masks may hold infinities as buffers.
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    wrong += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ExportError(f"The weights hold values that are not finite: {shorten(wrong[0])}{more}. Train them again.")


def _trace(model: nn.Module, spec: ExportSpec, time_limit: float) -> ExportedProgram:
    """Trace at a batch, height and width that are no special case: none is 1, native, square or a multiple of a window.

    A traced branch then is the one of the general case, such as padding that is not zero. They are larger than the
    native ones: the tracer holds what is 1 there, such as the number of windows of a small map, for 1 everywhere.
    """
    height, width = spec.input_size[1:]
    if spec.dynamic_size:
        height, width = scaled_size(height, 1.25, spec), scaled_size(width, 1.5, spec)
    images = random_images(spec, spec.batch or 2, (height, width), seed=0)
    outputs = len(outputs_of(model, images))
    if outputs != len(spec.output_names):
        raise ExportError(
            f"{spec.model} gives {outputs} outputs, but its names for them are {', '.join(spec.output_names)}. "
            "State one name an output as the attribute `output_names`."
        )
    dims: dict[int, Any] = {0: Dim.DYNAMIC} if spec.batch is None else {}
    if spec.dynamic_size and spec.size_multiple == 1:
        dims |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    elif spec.dynamic_size:
        # Saying that a size is a multiple spares the tracer branches on remainders that it could not decide.
        least = max(1, (spec.size_minimum or 1) // spec.size_multiple)
        dims |= {axis: spec.size_multiple * Dim(f"{AXES[axis]}_units", min=least) for axis in (2, 3)}
    try:
        return trace(model, images, [dims for _ in images], time_limit)
    # The tracer raises what the traced code raises, and many kinds of its own.
    except Exception as error:
        raise refusal("torch.export", spec, error) from error


def translate(program: ExportedProgram, spec: ExportSpec, axes: Sequence[dict[int, str]]) -> Any:
    """Translate to ONNX (a `torch.onnx.ONNXProgram`) and write the metadata.

    Args:
        program: What was traced, without operators of this package.
        spec: The metadata.
        axes: The names of each input's dynamic axes.

    Raises:
        ExportError: The exporter refuses it.
    """
    onnx = require("onnx", "export")
    clear = require("onnx_ir.passes.common", "export").ClearMetadataAndDocStringPass()
    try:
        with warnings.catch_warnings():
            # Two inputs share their axes, which the exporter finds worth a warning an axis.
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
            f"The exporter wrote operator set {model.opset_imports['']} instead of {spec.opset}. "
            "Leave out --opset (opset=)."
        )
    # The exporter notes the stack trace of every node: paths of this machine, and a third of a small file.
    clear(model)
    # The exporter writes its own newest version, which older runtimes refuse whatever is in the file.
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", spec.opset)])
    model.metadata_props.update(spec.to_metadata())
    return translated


def refusal(who: str, spec: ExportSpec, error: Exception) -> ExportError:
    """What to raise where a tool does not take a model: who, what, why, and what to do."""
    size = size_text(*spec.input_size[1:])
    dynamic = f" with dynamic {', '.join(spec.dynamic_axes)}" if spec.dynamic_axes else ""
    text = f"{who} refuses {spec.model}{dynamic}. Reason: {_reason(error)}"
    if spec.dynamic_size:
        text += f" To export one fixed size ({size}) instead, use --static-size (dynamic_size=False)."
    return ExportError(text)


def _reason(error: BaseException) -> str:
    """The lines of an exporter's long message that name the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([line for line in lines if line.startswith("- ")][:3] or lines[:1])
