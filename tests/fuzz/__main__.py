"""Feed damaged input to everything that reads it: `python -m tests.fuzz --seconds 3600 --seed 7 [--surface NAME]`.

A case's damage is drawn from seed, surface and number: `--surface NAME --case NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.running import cases, surface_named
from tests.fuzz.surfaces import SURFACES


def main() -> int:
    """Run until the time is over; the exit code is 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", choices=[surface.name for surface in SURFACES], help="default: all, in turn")
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"), help="folder for the files of faulty cases")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no thread pool of its parent's
    chosen = [surface_named(args.surface)] if args.surface else SURFACES
    found, done, end = 0, 0, time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as root:
        for surface in chosen:
            (Path(root) / surface.name).mkdir()
        running = [
            (s, cases(s, Path(root) / s.name, args.seed, itertools.count() if args.case is None else [args.case]))
            for s in chosen
        ]
        for surface, results in itertools.cycle(running):
            if time.monotonic() > end or (result := next(results, None)) is None:
                break
            done += 1
            if result.fault:
                found += 1
                print(f"{surface.name} {result.number}: {result.fault}", flush=True)
                target = args.keep / f"{surface.name}-{args.seed}-{result.number}"
                shutil.copytree(Path(root) / surface.name / "case", target, dirs_exist_ok=True, symlinks=True)
    print(f"{done} cases, {found} faults")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
