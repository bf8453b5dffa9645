"""The function behind `visionattn arena`: measure mixers, resume an interrupted run, and write the report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from joblib import Parallel, cpu_count, delayed
from rich.console import Console

import visionattn
from visionattn.arena import accuracy, cost, recall, regression
from visionattn.arena.nets import CONTROLS
from visionattn.arena.plan import FULL, QUICK, Found, Plan
from visionattn.arena.report import write_report
from visionattn.arena.results import Arena
from visionattn.arena.rows import Cell, Row, read_rows, write_rows
from visionattn.devices import find_device
from visionattn.errors import InputError, shorten
from visionattn.files import check_folder, exclusive
from visionattn.mixers import MIXERS, find_mixer
from visionattn.progress import counted

__all__ = ["LEFT_OUT", "TASKS", "arena"]

TASKS = ("cost", "recall", "regression", "accuracy")
LEFT_OUT = {
    "local_linear": "a slow reference implementation of parallax",
    "fixed_qk": "requires reference tokens; without them its attention is uniform",
}
"""Mixers that are measured only if they are named, with the reason."""


def arena(
    mixers: str | Sequence[str] = (),
    tasks: str | Sequence[str] = TASKS,
    grid: int | Sequence[int] | None = None,
    seeds: int | None = None,
    quick: bool = False,
    data: str | Path | None = None,
    output: str | Path = "runs/arena",
    device: str = "auto",
    processes: int | None = None,
    console: Console | None = None,
) -> Arena:
    """Compare mixers, and write `report.html`, `report.md` and `results.csv`.

        visionattn.arena(["hsa", "window"], tasks=["cost", "recall"])

    Measurements that exist in the same folder, with the same sizes and for the same kind of device, are kept, so that
    the same call resumes an interrupted run. The controls are part of every run: softmax attention, no mixing, mean
    pooling and a random map.

    Args:
        mixers: Names in `visionattn.mixers.MIXERS`; empty: all but `LEFT_OUT`.
        tasks: Some of `TASKS`.
        grid: Sides of the square grids on which costs are measured; None: 14 to 128, or 14 to 56 if `quick`.
        seeds: Number of training seeds; None: 3, or 1 if `quick`.
        quick: Train and measure for about a quarter of the time.
        data: Folder of images for the task "accuracy", `train/CLASS/*` and `test/CLASS/*`, all of one size divisible by
            8; None: the embedded digits.
        output: Folder of the report.
        device: "auto", "cpu" or "cuda".
        processes: Number of networks to train in parallel, each on one thread; None: one per core, or 1 on a GPU. The
            results do not depend on it.
        console: Console that shows progress; None: no output.

    Returns:
        The results; `print` shows their table.

    Raises:
        UnknownNameError: A mixer does not exist.
        InputError: A task, a grid or the number of seeds is not accepted, or the device is not available.
        DataError: The images cannot be read.
        StorageError: The report cannot be written.
    """
    mixers, tasks = ([given] if isinstance(given, str) else given for given in (mixers, tasks))
    for name in mixers:
        find_mixer(name)
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"tasks must be some of {', '.join(map(repr, TASKS))}; got {shorten(task)!r}.")
    plan = QUICK if quick else FULL
    sides = [grid] if isinstance(grid, int) else list(grid or plan.sides)
    seeds = plan.seeds if seeds is None else seeds
    if (
        not tasks
        or any(type(n) is not int for n in (seeds, *sides))
        or seeds < 1
        or not 2 <= min(sides) <= max(sides) <= 512
    ):
        raise InputError(
            "arena requires at least one task, seeds of at least 1, and sides of grids from 2 to 512, all integers."
        )
    plan = replace(plan, sides=sorted(set(sides)), seeds=seeds)
    where = find_device(device)
    if processes is None:
        processes = cpu_count() if where.type == "cpu" else 1
    if type(processes) is not int or processes < 1:
        raise InputError(f"processes must be an integer of at least 1; got {shorten(processes)}.")
    folder = check_folder(output)
    images = None if data is None else check_images(data)
    chosen = dict.fromkeys([*CONTROLS, *(mixers or (name for name in MIXERS if name not in LEFT_OUT))])
    cells = [
        Cell(task, name, seed, recipe(plan, task, images), device_name(where))
        for task in TASKS
        if task in tasks
        for name in chosen
        for seed in range(1 if task == "cost" else plan.seeds)
    ]
    with exclusive(folder):
        rows = measure(cells, folder / "results.csv", plan, where, images, processes, console)
        found = Arena(folder, list(chosen), [row for row in rows if row.cell in set(cells)], plan, images)
        write_report(found)
    return found


def check_images(data: str | Path) -> Path:
    """Read the folder of images once, so that errors are reported before any training."""
    folder = Path(data).resolve()
    accuracy.read_images(folder)
    return folder


def recipe(plan: Plan, task: str, images: Path | None) -> str:
    """Sizes of a task, with the images for the task "accuracy"."""
    return plan.recipe(task) + (f"; {images or 'digits'}" if task == "accuracy" else "")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or architecture of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Set the number of PyTorch threads within a context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Measured(NamedTuple):
    """A cell with its results."""

    cell: Cell
    found: list[Found]
    threads: int
    seconds: float


def measure_cell(cell: Cell, plan: Plan, device: torch.device, images: Path | None) -> Measured:
    """Measure one cell."""
    # More threads slow down small networks if the processors are busy, and change the results.
    threads = torch.get_num_threads() if cell.task == "cost" else 1
    start = time.perf_counter()
    with threads_of_torch(threads):
        if cell.task == "cost":
            found = cost.run(cell.mixer, plan.sides, plan, device)
        elif cell.task == "recall":
            found = recall.run(cell.mixer, cell.seed, plan, device)
        elif cell.task == "regression":
            found = regression.run(cell.mixer, cell.seed, plan, device)
        else:
            found = accuracy.run(cell.mixer, cell.seed, plan, device, images)
    return Measured(cell, found, threads, round(time.perf_counter() - start, 2))


def measure(
    cells: Sequence[Cell],
    file: Path,
    plan: Plan,
    device: torch.device,
    images: Path | None,
    processes: int,
    console: Console | None,
) -> list[Row]:
    """Measure the cells that the file does not contain yet, writing the file after each, and return all rows."""
    rows, damaged = read_rows(file)
    if damaged and console is not None:
        console.print(f"{damaged} damaged rows of {shorten(file)} are measured again.")
    version = visionattn.__version__
    known = {row.cell for row in rows if (row.torch, row.visionattn) == (torch.__version__, version)}
    todo = [cell for cell in cells if cell not in known]
    rows = [row for row in rows if row.cell not in set(todo)]
    order = {cell: number for number, cell in enumerate(cells)}
    timed, trained = ([cell for cell in todo if (cell.task == "cost") == costs] for costs in (True, False))
    with counted("measurements", len(todo), console) as advance:
        # Costs are measured while nothing else runs.
        for some, at_once in ((timed, 1), (trained, min(processes, len(trained)))):
            for one in _measured(some, plan, device, images, at_once):
                rows += [
                    Row(
                        *one.cell[:3], *number, *one.cell[3:], one.threads, str(torch.__version__), version, one.seconds
                    )
                    for number in one.found
                ]
                rows.sort(key=lambda row: order.get(row.cell, -1))
                write_rows(file, rows)
                advance(1)
    return rows


def _measured(
    cells: Sequence[Cell], plan: Plan, device: torch.device, images: Path | None, processes: int
) -> Iterator[Measured]:
    """Measure cells, and yield each when it is done, in any order."""
    if processes <= 1:
        for cell in cells:
            yield measure_cell(cell, plan, device, images)
        return
    runs = Parallel(n_jobs=processes, return_as="generator_unordered")
    yield from runs(delayed(measure_cell)(cell, plan, device, images) for cell in cells)
