"""Measure mixers by `visionattn.arena`, and keep its rows with revision and date: results/arena.csv.

    python -m benchmarks.mixers.arena                                       # all: half an hour on two cores
    python -m benchmarks.mixers.arena --device cuda
    python -m benchmarks.mixers.arena hsa window --data FOLDER              # accuracy on images train/CLASS, test/CLASS

After an interruption the same command resumes: state and report are in `runs/arena`. Rows of accuracy name the folder
of images.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import visionattn
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.arena.api import TASKS
from visionattn.progress import new_console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="*", help="names; all, if none is given")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", type=Path, help="images by class; only the task accuracy is run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="runs/arena")
    args = parser.parse_args()
    console = new_console()
    tasks = args.tasks if args.data is None else ["accuracy"]
    found = visionattn.arena(
        args.mixers, tasks, data=args.data, output=args.output, device=args.device, console=console
    )
    console.print(found.table())
    origin = environment(args.device)
    rows = [{**asdict(row), **origin} for row in found.rows]
    if args.data is not None:
        for row in rows:  # folders differ between machines
            row["recipe"] = row["recipe"].replace(str(args.data.resolve()), args.data.resolve().name)
    write_rows(RESULTS / "arena.csv", rows, key=("device", "task", "recipe"))


if __name__ == "__main__":
    main()
