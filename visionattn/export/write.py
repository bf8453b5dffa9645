"""Write the files of a model, each in three steps, and put them in place only after all have passed their checks.

torch.export with symbolic axes (`visionattn.export.trace`) -> ONNX, or a program, with metadata
(`visionattn.export.translate`) -> comparison with PyTorch (`visionattn.export.check`)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from visionattn.errors import ExportError, require, shorten
from visionattn.export.budget import TIME_LIMIT, Budget
from visionattn.export.check import check_file
from visionattn.export.check_pair import check_pair
from visionattn.export.check_program import check_program
from visionattn.export.formats import set_metadata
from visionattn.export.pad import pad_file
from visionattn.export.part import Part
from visionattn.export.rows import CheckRow
from visionattn.export.runtime import open_exported
from visionattn.export.sizes import check_sizes, program_sizes
from visionattn.export.spec import ExportSpec, size_text
from visionattn.export.trace import trace_graph
from visionattn.export.translate import save_program, translate
from visionattn.files import atomic_path

__all__ = ["OnnxFile", "write_parts"]

# A protobuf message, and so a file that contains its own weights, is limited to 2 GiB; the graph needs some of it.
MAX_WEIGHT_BYTES = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxFile:
    """An exported file.

    Attributes:
        path: The file.
        spec: Its metadata.
        nodes: Number of operators in its graph.
        bytes: Its size.
        seconds: Duration of the export, including the check.
        rows: The rows of the check; empty without a check. What it left out, the metadata list as `unchecked`.
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


def write_parts(
    parts: Sequence[Part],
    *,
    pad_channels: bool = False,
    check: bool = True,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> tuple[OnnxFile, ...]:
    """Write a model as one file, or as a tower and a head.

    Args:
        parts: The files to write.
        pad_channels: Pad the channels of convolutions (see `visionattn.export.pad`).
        check: Compare them with the model.
        time_limit: Maximum CPU time for tracing, translating and checking all files, in seconds. If some sizes have
            been checked by then, the others are left out and listed in the metadata.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: The model cannot be exported in this form or in this time, its weights are not finite, or the
            outputs of a file differ from its own.
        InputError: There are no channels to pad, or the limit is not above 0.
        StorageError: A file could not be written.
    """
    files, budget = [], Budget(time_limit, progress)
    with ExitStack() as stack:
        paths = [stack.enter_context(atomic_path(part.path)) for part in parts]
        for number in range(1, len(parts) + 1):
            files.append(_write(parts[:number], paths[:number], pad_channels, check, budget))
    return tuple(files)


def _write(parts: Sequence[Part], paths: Sequence[Path], pad_channels: bool, check: bool, budget: Budget) -> OnnxFile:
    """Write the last of the parts; for a head, the tower is the first."""
    start, part, path, tell = time.perf_counter(), parts[-1], paths[-1], budget.tell
    is_program = path.suffix.lower() == ".pt2"
    if not is_program:
        _check_weights(part.model)
    sizes = (program_sizes if is_program else check_sizes)(parts[0].spec)
    spec = replace(part.spec, unchecked=[] if check else [size_text(*size) for size in sizes])
    if part.pair is not None:
        tell("Tracing, translating and checking the head.")
        tell = lambda line: None  # noqa: E731
    steps = (1 if is_program else 2) + check
    duration = "; large networks take minutes" if is_program else ", usually a few seconds"
    limit = f" All steps may take {budget.limit:,.10g} s of CPU time." if budget.limit < math.inf else ""
    tell(f"Exporting {spec.model}, step 1 of {steps}: tracing{duration}.{limit}")
    traced = trace_graph(part.model, part.inputs, spec, budget)
    if is_program:
        program, nodes = save_program(traced, spec, path), len(traced.graph.nodes)
    else:
        seconds = time.perf_counter() - start  # translating takes 0.4 to 1.3 times as long as tracing
        tell(f"Step 2 of {steps}: translating {len(traced.graph.nodes):,} operations, about {1.3 * seconds:.0f} s.")
        nodes = translate(traced, spec, path, budget)
        if pad_channels:
            pad_file(path)
    rows: list[CheckRow] = []
    if check:
        what = "program with the model" if is_program else "file with PyTorch"
        tell(f"Step {steps} of {steps}: comparing the {what} at {len(sizes)} size{'s' * (len(sizes) > 1)}.")
        if is_program:
            rows, unchecked = check_program(part.model, program, spec, budget)
        elif part.pair is None:
            rows, unchecked = check_file(part.model, open_exported(path), budget)
        else:
            rows, unchecked = check_pair(part.pair, open_exported(paths[0]), open_exported(path), budget)
        if unchecked:
            spec = replace(spec, unchecked=unchecked)
            if is_program:
                save_program(traced, spec, path)
            else:
                onnx = require("onnx", "export")
                model = onnx.load(path)
                set_metadata(model, spec)
                onnx.save(model, path)
    return OnnxFile(part.path, spec, nodes, path.stat().st_size, time.perf_counter() - start, rows)


def _check_weights(model: nn.Module) -> None:
    """Raise `ExportError` for weights that are not finite, or too large for one file."""
    # Buffers may be masks, which contain infinities.
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    wrong += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ExportError(
            f"The weights contain values that are not finite: {shorten(wrong[0])}{more}. Train the model again."
        )
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_WEIGHT_BYTES:
        raise ExportError(f"The weights take {size / 1e9:.1f} GB; a single ONNX file must be smaller than 2.1 GB.")
