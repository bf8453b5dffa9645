"""Measure all mixers by `visionattn.arena`, and keep its rows with revision and date: results/arena.csv.

    python -m benchmarks.mixers.arena                     # about 35 minutes on two cores
    python -m benchmarks.mixers.arena --device cuda

Stopped, the same command goes on: state and report are in `runs/arena`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import visionattn
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.progress import new_console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="runs/arena")
    args = parser.parse_args()
    console = new_console()
    found = visionattn.arena(output=args.output, device=args.device, console=console)
    console.print(found.table())
    origin = environment(args.device)
    write_rows(RESULTS / "arena.csv", [{**asdict(row), **origin} for row in found.rows])


if __name__ == "__main__":
    main()
