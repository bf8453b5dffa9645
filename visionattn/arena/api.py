"""The function beside `visionattn arena`: it measures, goes on where it was stopped, and writes the report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
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
    "local_linear": "a slow reference of parallax",
    "fixed_qk": "needs tokens as its reference, and is uniform without",
}
"""Mixers that take part only when they are named, and why."""


def arena(
    mixers: str | Sequence[str] = (),
    tasks: str | Sequence[str] = TASKS,
    grid: int | Sequence[int] | None = None,
    seeds: int | None = None,
    quick: bool = False,
    data: str | Path | None = None,
    output: str | Path = "runs/arena",
    device: str = "auto",
    console: Console | None = None,
) -> Arena:
    """Measure mixers side by side, and write `report.html`, `report.md` and `results.csv`.

        visionattn.arena(["hsa", "window"], tasks=["cost", "recall"])

    What was measured before in the same folder with the same sizes and on the same kind of device is kept, so that the
    same call goes on after it was stopped. Controls take part in each run: softmax attention, no mixing, mean pooling
    and a random map.

    Args:
        mixers: Names in `visionattn.mixers.MIXERS`; none: all but `LEFT_OUT`.
        tasks: Of `TASKS`.
        grid: Sides of the square grids whose costs are measured; None: 14 to 128, or 14 to 56 if `quick`.
        seeds: Of everything that is trained, from 0; None: 3, or 1 if `quick`.
        quick: Train and measure a quarter as long.
        data: Folder of images, `train/CLASS/*` and `test/CLASS/*`, all of one size divisible by 8, for the task
            accuracy; None: the embedded digits.
        output: Folder of the report.
        device: Where to work: "auto", "cpu", "cuda".
        console: Shows progress; None: nothing is shown.

    Returns:
        The results; `print` shows their table.

    Raises:
        UnknownNameError: There is no mixer of a name.
        InputError: A task, a grid or the number of seeds is not accepted, or the device is not there.
        DataError: The images cannot be read.
        StorageError: The report cannot be written.
    """
    mixers, tasks = ([given] if isinstance(given, str) else given for given in (mixers, tasks))
    for name in mixers:
        find_mixer(name)
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"A task must be one of {', '.join(map(repr, TASKS))}; got {shorten(task)!r}.")
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
            "An arena needs a task, seeds of at least 1, and grids with sides from 2 to 512, all integers."
        )
    plan = replace(plan, sides=sorted(set(sides)), seeds=seeds)
    where = find_device(device)
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
        rows = measure(cells, folder / "results.csv", plan, where, images, console)
        found = Arena(folder, list(chosen), [row for row in rows if row.cell in set(cells)], plan, images)
        write_report(found)
    return found


def check_images(data: str | Path) -> Path:
    """The folder of images, read once, so that a mistake is told before anything is trained."""
    folder = Path(data).resolve()
    accuracy.read_images(folder)
    return folder


def recipe(plan: Plan, task: str, images: Path | None) -> str:
    """Sizes of a task, and the images of accuracy."""
    return plan.recipe(task) + (f"; {images or 'digits'}" if task == "accuracy" else "")


def device_name(device: torch.device) -> str:
    """Name of the GPU or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    cells: Sequence[Cell], file: Path, plan: Plan, device: torch.device, images: Path | None, console: Console | None
) -> list[Row]:
    """All rows of the file after the cells that it does not hold yet were measured; it is written after each."""
    rows, damaged = read_rows(file)
    if damaged and console is not None:
        console.print(f"{damaged} damaged rows of {shorten(file)} are measured again.")
    version = visionattn.__version__
    known = {row.cell for row in rows if (row.torch, row.visionattn) == (torch.__version__, version)}
    todo = [cell for cell in cells if cell not in known]
    rows = [row for row in rows if row.cell not in set(todo)]
    runs: dict[str, Callable[[Cell], list[Found]]] = {
        "cost": lambda cell: cost.run(cell.mixer, plan.sides, plan, device),
        "recall": lambda cell: recall.run(cell.mixer, cell.seed, plan, device),
        "regression": lambda cell: regression.run(cell.mixer, cell.seed, plan, device),
        "accuracy": lambda cell: accuracy.run(cell.mixer, cell.seed, plan, device, images),
    }
    with counted("measurements", len(todo), console) as advance:
        for cell in todo:
            # More threads slow small networks down where the processors are busy, and change the numbers.
            threads = torch.get_num_threads() if cell.task == "cost" else 1
            start = time.perf_counter()
            with threads_of_torch(threads):
                found = runs[cell.task](cell)
            seconds = round(time.perf_counter() - start, 2)
            rows += [
                Row(*cell[:3], *number, *cell[3:], threads, str(torch.__version__), version, seconds)
                for number in found
            ]
            write_rows(file, rows)
            advance(1)
    return rows
