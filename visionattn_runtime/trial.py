"""Run a file in a separate process with inputs of given shapes, and measure its time and memory.

    python -m visionattn_runtime.trial '{"file": "model.onnx", "threads": 1, "seconds": 1.0, "trials": [...]}'

A trial lists for each input its numpy type and shape, and for floats the range. Each trial prints one line of JSON, and
the last line states the memory. A crash of the process, for example by lack of memory, does not affect its parent.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime

from visionattn_runtime.errors import short

__all__ = ["make_inputs", "try_file"]

MOST_RUNS = 200
MIB = 2**20
SHARE = 0.9  # quantile of the values: rounding changes some decisions between close scores


def make_inputs(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draw inputs with a fixed seed; the first image of a batch does not depend on the batch size.

    Args:
        inputs: For each name `type`, `shape` and, for floats, `range`. Integers other than uint8 are 0, a valid index.
    """
    arrays = {}
    for name, value in inputs.items():
        dtype, shape = np.dtype(value["type"]), value["shape"]
        rng = np.random.default_rng(0)
        if dtype == np.uint8:
            arrays[name] = rng.integers(0, 256, shape, np.uint8)
        elif dtype.kind == "f":
            low, high = value.get("range", (0, 1))
            arrays[name] = (low + (high - low) * rng.random(shape)).astype(dtype)
        else:
            arrays[name] = np.zeros(shape, dtype)
    return arrays


def try_file(plan: dict[str, Any]) -> None:
    """Print the result of each trial of a plan (see the module)."""
    before = _peak()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = plan["threads"]
    try:
        session = onnxruntime.InferenceSession(plan["file"], options, providers=["CPUExecutionProvider"])
    # ONNX Runtime's exceptions share no base class but Exception.
    except Exception as error:
        _print(error=short(error, 300))
        return
    loaded, alone = _peak(), None
    for inputs in plan["trials"]:
        try:
            feeds = make_inputs(inputs)
            outputs = session.run(None, feeds)
            seconds = _time(session, feeds, plan["seconds"], plan["threads"])
        except Exception as error:
            _print(error=short(error, 300))
            continue
        numbers = [array for array in outputs if isinstance(array, np.ndarray) and array.dtype.kind == "f"]
        batch = next(iter(feeds.values())).shape[0]
        # The first image of a batch must give the same result as alone.
        differs = None
        if alone is not None and batch > 1:
            differs = max((_difference(one, many) for one, many in zip(alone, numbers)), default=0.0)
        elif batch == 1:
            alone = numbers
        _print(
            shapes=[list(np.shape(array)) for array in outputs],
            finite=all(bool(np.isfinite(array).all()) for array in numbers),
            largest=max((float(np.abs(array).max(initial=0)) for array in numbers), default=0.0),
            differs=differs,
            seconds=seconds,
        )
    _print(memory={"loaded": max(loaded - before, 0) * MIB, "peak": max(_peak() - before, 0) * MIB})


def _difference(one: np.ndarray, many: np.ndarray) -> float:
    if one.shape[1:] != many.shape[1:]:
        return float("inf")
    difference = np.abs(one[:1].astype(np.float64) - many[:1])
    return float(np.quantile(difference, SHARE, method="higher")) if difference.size else 0.0


def _time(session: Any, feeds: dict[str, np.ndarray], budget: float, threads: int) -> list[float]:
    # CPU time is less affected by other processes, but equals latency only with one thread.
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end and len(seconds) < MOST_RUNS:
        start = clock()
        session.run(None, feeds)
        seconds.append(clock() - start)
    return seconds


def _peak() -> float:
    """Peak memory of this process so far, in MiB; 0 if the system does not report it."""
    try:
        # getrusage would include the memory of the parent before this program was started.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0


def _print(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try_file(json.loads(sys.argv[1]))
