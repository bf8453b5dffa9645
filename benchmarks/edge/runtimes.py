"""Small networks in the runtimes of other frameworks, phones and browsers, each in an environment of its own.

    python -m benchmarks.edge.runtimes FOLDER [--runtimes OpenVINO MNN] [--cases digits] [--rounds 20] [--make]

FOLDER holds an environment for each runtime; `--make` makes those that are missing, by uv or by venv and pip, from
packages of the index that is set up. A cell is a process of its own: convert, load, compare with PyTorch in float32
and float64, time against ONNX Runtime in turn, both on one thread, by the
processor time that they take. Writes results/runtimes.csv.

`status` is "runs", "wrong" (error above 5 % of the largest output in float32), "converted" (Core ML, which runs on
Apple's systems only), or "fails" with the step in `step` and the reason in `reason`. Errors are the largest difference
to PyTorch; of a network that rounds positions, the one to float64 beside PyTorch's own says which errors are rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.edge.cases import CASES, SEED, write_case
from benchmarks.edge.engines import ENGINES
from benchmarks.report import RESULTS, environment, summarize, write_rows

WRONG = 0.05  # of the largest output: where positions are rounded, single pixels may be off by more than the rest
ROOT = RESULTS.parent
SECONDS = 900  # for one cell
TRACING = (
    "torch==2.14.1",
    "torchvision==0.29.1",
    "timm",
    "rich",
    "shtab",
    "filelock",
    "huggingface-hub",
    "safetensors",
)


@dataclass(frozen=True)
class Environment:
    """What a runtime's environment holds.

    Args:
        packages: Installed with what they require.
        alone: Installed without that: pnnx asks for PyTorch, which its program does not need.
    """

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()


ENVIRONMENTS = {
    "OpenVINO": Environment(("openvino", "onnxruntime")),
    "ncnn": Environment(("ncnn", "onnxruntime"), alone=("pnnx",)),
    "MNN": Environment(("MNN", "onnxruntime")),
    "LiteRT": Environment(("litert-torch", "onnxruntime", *TRACING)),
    "ExecuTorch": Environment(("executorch", "onnxruntime", *TRACING)),
    "Core ML": Environment(("coremltools", *TRACING)),
}


def python_of(folder: Path, runtime: str) -> Path:
    """The interpreter of a runtime's environment."""
    return folder / runtime.lower().replace(" ", "") / "bin" / "python"


def make_environment(folder: Path, runtime: str) -> None:
    """Make a runtime's environment, by uv where it is installed."""
    python, wanted = python_of(folder, runtime), ENVIRONMENTS[runtime]
    home = python.parent.parent
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "--python", sys.executable, home], check=True)
        install = [uv, "pip", "install", "--python", python]
    else:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install = [python, "-m", "pip", "install"]
    subprocess.run([*install, *wanted.packages], check=True)
    if wanted.alone:
        subprocess.run([*install, "--no-deps", *wanted.alone], check=True)


def run_cell(python: Path, runtime: str, folder: Path, case: str, rounds: int) -> dict[str, Any]:
    """Output of `engines.py` for a case in a runtime."""
    script = Path(__file__).with_name("engines.py")
    command = [python, script, runtime, folder, case, "--rounds", str(rounds)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"versions": "", "step": "conversion", "reason": f"more than {SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"versions"')]
    if not lines:
        last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"versions": "", "step": "process", "reason": f"ends with code {done.returncode}. {''.join(last)}"}
    return json.loads(lines[0])


def status_of(found: dict[str, Any]) -> str:
    """One word for how far a network comes."""
    if found["step"] == "ran":
        return "runs" if found["error_float32"] <= WRONG * found["largest_output"] else "wrong"
    return found["step"] if found["step"] == "converted" else "fails"


def row_of(runtime: str, case: str, folder: Path, found: dict[str, Any], origin: dict) -> dict[str, Any]:
    """The row of a cell."""
    columns = {"median_ms": "", "iqr_ms": "", "ratio": ""}
    if "times" in found:
        columns = summarize(found["times"], "onnxruntime")["runtime"]
    expected = np.load(folder / "expected.npz")
    own = np.abs(expected["float32"] - expected["float64"]).max()
    height, width = CASES[case].size
    return {
        "runtime": runtime,
        "model": CASES[case].name,
        "input": f"{height}x{width}",
        "weights": "shipped" if CASES[case].pretrained else "random",
        "status": status_of(found),
        "step": found["step"],
        "reason": found["reason"].replace(f"{ROOT}/", "").replace(f"{folder}/", "")[:160],
        "bytes": found.get("bytes", ""),
        "onnx_bytes": (folder / "model.onnx").stat().st_size,
        **{key: f"{found[key]:.1e}" if key in found else "" for key in ("error_float32", "error_float64")},
        "pytorch_error_float64": f"{own:.1e}",
        "largest_output": f"{np.abs(expected['float32']).max():.2g}",
        **columns,
        "threads": 1,
        "rounds": len(found.get("times", {}).get("runtime", [])),
        "convert_s": f"{found['convert_s']:.0f}" if "convert_s" in found else "",
        "versions": found["versions"],
        "onnxruntime": found.get("onnxruntime", ""),
        **origin,
        "seed": SEED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the environments")
    parser.add_argument("--runtimes", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20, help="0: compare only")
    parser.add_argument("--make", action="store_true", help="make environments that are missing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin = environment("cpu")  # before rows change the checkout
    for runtime in args.runtimes:
        if not python_of(args.folder, runtime).exists():
            if not args.make:
                raise SystemExit(f"There is no environment of {runtime} in {args.folder}: --make makes it.")
            make_environment(args.folder, runtime)
    for case in args.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with torch.no_grad():
                write_case(CASES[case], folder)
            for runtime in args.runtimes:
                found = run_cell(python_of(args.folder, runtime), runtime, folder, case, args.rounds)
                row = row_of(runtime, case, folder, found, origin)
                print(*(row[key] for key in list(row)[:15]), sep=" | ", flush=True)
                write_rows(RESULTS / "runtimes.csv", [row], key=("device", "runtime", "model"))


if __name__ == "__main__":
    main()
