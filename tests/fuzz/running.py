"""One case in a child process with limits on time and memory, and what counts as a fault of it."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.fuzz.surfaces import SURFACES, Surface
from visionattn.errors import VisionAttnError
from visionattn.files import TEMPORARY

CPU_SECONDS = 60
MEMORY = 4 * 2**30  # more than the parent process has
LONGEST = 2000  # characters of an error
CRASH = 70


class Result(NamedTuple):
    """How a case ended: its number, the exit code (negative for a signal), and what is wrong with that, or None."""

    number: int
    code: int
    fault: str | None


def cases(surface: Surface, folder: Path, seed: int, numbers: Iterable[int]) -> Iterator[Result]:
    """Run cases of a surface, each with its files in `folder / "case"`."""
    seeds, case = folder / "seeds", folder / "case"
    seeds.mkdir()
    code, _, told = _in_child(lambda: surface.prepare(seeds), folder)
    if code != 0:
        raise RuntimeError(f"{surface.name} could not be prepared: {told}")
    for number in numbers:
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        call = surface.damage(Random(f"{seed}/{surface.name}/{number}"), seeds, case)
        code, out, told = _in_child(call, case)
        yield Result(number, code, _fault(code, out, told, case))


def _fault(code: int, out: str, told: str, folder: Path) -> str | None:
    """What is wrong with how a case ended, or None."""
    lines = [line for line in told.splitlines() if line.startswith("visionattn: ")]
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (time, memory or a crash in native code)"
    if code == CRASH or "Traceback" in told + out:
        return f"an exception that is no VisionAttnError: {told[-3000:]}"
    if code not in (0, 1, 2):
        return f"exit code {code}: {told[-500:]}"
    if code == 2 and (len(lines) != 1 or not told.endswith(f"{lines[0]}\n")):
        return f"the error is not one line: {told[-1000:]}"
    if any(len(line) > LONGEST for line in told.splitlines()):
        return f"an error of {len(told)} characters: {told[:200]}"
    if "not enough memory" in told:
        return f"more than {MEMORY / 2**30:.0f} GiB were asked for"
    left = [path.name for path in folder.rglob(f"{TEMPORARY}*")]
    return f"left behind: {', '.join(left)}" if left else None


def _in_child(call: Callable[[], int | None], folder: Path) -> tuple[int, str, str]:
    """Exit code (negative for a signal), standard output and error output of a call in `folder`."""
    streams = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    process = os.fork()
    if process == 0:
        code = CRASH
        faulthandler.disable()
        try:
            for number, path in enumerate(streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = call() or 0
        except VisionAttnError as error:
            print(f"visionattn: {error}", file=sys.stderr)
            code = 2
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2 * bool(stop.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(process, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    return code, *(path.read_text(errors="replace") for path in streams)


def surface_named(name: str) -> Surface:
    """The surface of that name."""
    return next(surface for surface in SURFACES if surface.name == name)
