"""Check any ONNX file: validity, sizes at which it runs, supported devices and cost. `visionattn.check(FILE)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from visionattn.errors import InputError, VisionAttnError
from visionattn.export.check import CheckRow
from visionattn.export.inspect.compare import compare
from visionattn.export.inspect.running import Cost, Run, find_runs, image_inputs, measure_cost, own_size
from visionattn.export.inspect.structure import Structure, read_structure
from visionattn.export.inspect.targets import Target, find_targets
from visionattn.export.spec import ExportSpec
from visionattn.opening import open_model

__all__ = ["FileCheck", "check"]


@dataclass(frozen=True)
class FileCheck:
    """Result of checking an ONNX file.

    Attributes:
        path: The file.
        bytes: Its size, without external data.
        structure: Its structure.
        metadata: Its metadata as strings.
        spec: The parsed metadata; None if `visionattn export` did not write it.
        runs: Test runs at several sizes and batches.
        targets: Operators supported on phones and in browsers.
        costs: Latency and memory by number of threads.
        comparison: The rows of a passed comparison with PyTorch; None without a model.
        problems: Problems found, one line each.
    """

    path: Path
    bytes: int
    structure: Structure
    metadata: dict[str, str]
    spec: ExportSpec | None
    runs: list[Run] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    comparison: list[CheckRow] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-serialisable values."""
        found = dataclasses.asdict(self)
        found["path"] = str(self.path)
        del found["spec"]  # it repeats the metadata
        return found


def check(
    path: str | Path,
    *,
    model: str | Path | nn.Module | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    threads: tuple[int, ...] = (1, 2),
    progress: Callable[[str], None] | None = None,
) -> FileCheck:
    """Check any ONNX file that takes images: its structure, where it runs and its cost.

    Args:
        path: The file, written by this package or by another tool.
        model: The PyTorch model that it was exported from, for comparison: name, weight file or module.
        checkpoint: Weight file for a name.
        image_size: Side, or height and width, of the first run. Default: the size stated in the file, else the first
            of 224, 256, 64 and 32 that runs.
        threads: Numbers of threads to time.
        progress: Called with a line at the start of each step.

    Returns:
        The result; `problems` lists what is wrong with the file.

    Raises:
        InputError: The file does not exist, is not ONNX, lacks external data, or does not take the image size.
        VisionAttnError: The model could not be opened.
    """
    tell = progress or (lambda line: None)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise InputError(f"The image size must be at least 1 x 1; got {size[0]} x {size[1]}.")
    if any(count < 1 for count in threads):
        raise InputError(f"The number of threads must be at least 1; got {min(threads)}.")
    network = None
    if model is not None or checkpoint is not None:
        network = open_model(model, checkpoint).model
    structure, metadata = read_structure(path)
    path, spec, problems = Path(path), None, []
    if structure.fault:
        problems.append(f"ONNX's checker: {structure.fault}")
    if "visionattn" in metadata:
        try:
            spec = ExportSpec.from_metadata(metadata)
        except InputError as error:
            problems.append(f"The metadata are invalid: {error}.")
    runs: list[Run] = []
    costs: list[Cost] = []
    rows = None
    try:
        image_inputs(structure)
        tell("Running the file at several sizes and batches.")
        size = own_size(path, structure, spec, size)
        runs = find_runs(path, structure, spec, size)
        problems += [f"At {run}." for run in runs if run.fault and run.stated]
        tell(f"Timing the file with {' and '.join(map(str, threads))} threads.")
        costs = measure_cost(path, structure, spec, size, threads)
    except InputError as error:
        if image_size is not None:
            raise
        problems.append(str(error))
    tell("Looking up the operators supported on phones and in browsers.")
    targets = find_targets(path, any(not run.fault for run in runs))
    if network is not None and size is not None:
        tell("Comparing the file with PyTorch.")
        try:
            rows, wrong = compare(path, structure, spec, network, size, tell)
            problems += [wrong] if wrong else []
        except VisionAttnError as error:
            problems.append(f"The file cannot be compared with PyTorch: {error}")
    return FileCheck(path, path.stat().st_size, structure, metadata, spec, runs, targets, costs, rows, problems)
