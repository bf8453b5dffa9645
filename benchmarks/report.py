"""What benchmark scripts share: paired timing, the columns that say where a number comes from, and the CSV file."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from visionattn.files import atomic_path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def environment(device: str) -> dict[str, str]:
    """Give the columns device, torch, triton, git_revision and date for a measurement on `device`."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "torch": torch.__version__,
        "triton": triton,
        "git_revision": _git_revision(),
        "date": date.today().isoformat(),
    }


def paired_milliseconds(
    functions: dict[str, Callable], device: str, repeats: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time functions that take turns in every round, so that a disturbance affects all of them.

    Args:
        functions: Implementation -> function without arguments.
        device: Where they work; a CUDA device is synchronised around each call.
        repeats: Rounds counted.
        warm_up: Rounds before them that are not.

    Returns:
        Implementation -> milliseconds, entry i of each from round i.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[warm_up:] for name, values in times.items()}


def summarize(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, str]]:
    """Give the columns median_ms, iqr_ms and ratio of each implementation.

    The ratio is the baseline's time over the implementation's in the same round, its median: above 1 is faster.
    """
    columns = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(base / value for base, value in zip(times[baseline], values, strict=True))
        columns[name] = {"median_ms": f"{median:.4f}", "iqr_ms": f"{high - low:.4f}", "ratio": f"{ratio:.3f}"}
    return columns


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict], key: tuple[str, ...] = ("device",)) -> None:
    """Write rows to a CSV file, replacing those with the same values in the columns `key`."""
    new = {tuple(str(row[column]) for column in key) for row in rows}
    kept = [row for row in read_rows(path) if tuple(row[column] for column in key) not in new]
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"
