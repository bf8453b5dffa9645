"""HaloNet-H0 as an ONNX file: halo attention in its form for exported graphs, the previous form, and two peers.

    git worktree add ../before eed5635
    python -m benchmarks.edge.halonet --before ../before --folder FOLDER

Writes results/edge_halonet.csv: milliseconds per image of 256 x 256 in ONNX Runtime on the CPU, at 1 and 2 threads. All
files are of that size and one image; peers are timm's models, exported with `torch.onnx.export`. Files that FOLDER
already holds are taken from there. Weights are random. The last convolution of each branch, zero at the start, gets
random numbers too, the same in both forms: else the attention would not reach the output. Nothing is timed before both
forms agree.

With one thread the time is that which the thread worked, so that other work on the machine counts less; with two it is
the clock's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from benchmarks.report import RESULTS, environment, summarize, write_rows

ROOT = Path(__file__).resolve().parents[2]
SIZE = 256
NETWORKS = {
    "before": "va_halonet_h0",
    "after": "va_halonet_h0",
    "halonet26t": "halonet26t",
    "fastvit_t8": "fastvit_t8",
}
# Runs in a checkout of its own, which decides about the form.
EXPORT = """
import sys
import timm, torch
import visionattn
from visionattn.export.onnx import export_onnx
name, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = timm.create_model(name).eval()
if name.startswith("va_"):
    export_onnx(model, path, input_size=(size, size), dynamic_size=False, check=False)
else:
    torch.onnx.export(model, (torch.randn(1, 3, size, size),), path, dynamo=True, external_data=False, verbose=False)
"""


def export(network: str, path: Path, checkout: Path) -> None:
    """Write one network's file, by the package of a checkout."""
    if not path.exists():
        command = [sys.executable, "-c", EXPORT, NETWORKS[network], str(path), str(SIZE)]
        subprocess.run(command, check=True, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)})


def filled(path: Path) -> bytes:
    """A file whose convolutions of zeros have random numbers."""
    model, generator = onnx.load(path), np.random.default_rng(0)
    for weight in model.graph.initializer:
        if len(weight.dims) == 4 and not numpy_helper.to_array(weight).any():
            numbers = generator.standard_normal(weight.dims, dtype=np.float32) * np.prod(weight.dims[1:]) ** -0.5
            weight.CopyFrom(numpy_helper.from_array(numbers.astype(np.float32), weight.name))
    return model.SerializeToString()


def compare(paths: dict[str, Path], threads: int, rounds: int) -> dict[str, dict[str, str]]:
    """Milliseconds of each file; the files take turns in every round."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # busy waiting does no work
    sessions = {name: onnxruntime.InferenceSession(filled(path), options) for name, path in paths.items()}
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    outputs = {name: session.run(None, {session.get_inputs()[0].name: image})[0] for name, session in sessions.items()}
    error = abs(outputs["after"] - outputs["before"]).max() / abs(outputs["before"]).max()
    if not error <= 1e-4:
        raise SystemExit(f"The forms differ by {error:.1e} of the largest output. Nothing was timed.")
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(rounds + 2):
        for name, session in sessions.items():
            start = clock()
            session.run(None, {session.get_inputs()[0].name: image})
            if number >= 2:
                times[name].append(1e3 * (clock() - start))
    fastest = {name: f"{min(values):.2f}" for name, values in times.items()}
    columns = summarize(times, "before")
    return {name: columns[name] | {"fastest_ms": fastest[name], "error": f"{error:.0e}"} for name in sessions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="checkout of eed5635")
    parser.add_argument("--folder", type=Path, required=True, help="where the exported files are")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    paths = {name: options.folder / f"{name}.onnx" for name in NETWORKS}
    for name, path in paths.items():
        export(name, path.resolve(), options.before.resolve() if name == "before" else ROOT)
    rows = []
    for threads in (1, 2):
        for name, columns in compare(paths, threads, options.rounds).items():
            size = paths[name].stat().st_size
            fixed = {"network": NETWORKS[name], "form": name if name in ("before", "after") else "", "image": SIZE}
            versions = {"onnxruntime": onnxruntime.__version__, **environment("cpu")}
            rows.append({**fixed, "threads": threads, **columns, "bytes": size, "rounds": options.rounds, **versions})
            print(name, threads, columns, flush=True)
    write_rows(RESULTS / "edge_halonet.csv", rows)


if __name__ == "__main__":
    main()
