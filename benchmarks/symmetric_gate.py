"""Symmetric gate: the operator against its definition, forward and forward with backward, side by side.

    python benchmarks/symmetric_gate.py --device cpu

Writes results/symmetric_gate.csv. Times nothing when the operator's values are wrong.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

import visionattn.kernels  # noqa: F401  registers the operator
from report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.kernels.symmetric_gate import symmetric_gate_definition

SEED = 0
IMPLEMENTATIONS = {
    "definition": symmetric_gate_definition,
    "operator": torch.ops.visionattn.symmetric_gate,
}
SHAPES = {
    "cpu": [(1, 48, 64, 64), (1, 48, 256, 256), (16, 48, 64, 64)],
    "cuda": [(1, 48, 256, 256), (16, 48, 64, 64), (1, 48, 720, 1280)],
}
DTYPES = {
    "cpu": {torch.float32: 1e-6, torch.bfloat16: 2e-2},
    "cuda": {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3},
}


def infer(function, inputs: list[Tensor], cotangent: Tensor) -> Tensor:
    with torch.inference_mode():
        return function(*inputs)


def gradients(function, inputs: list[Tensor], cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, cotangent)


def check(inputs: list[Tensor], cotangent: Tensor, tolerance: float) -> None:
    """Compare the operator with the float64 definition, forward and both gradients."""
    found = gradients(IMPLEMENTATIONS["operator"], inputs, cotangent)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = gradients(IMPLEMENTATIONS["definition"], doubles, cotangent.double())
    for result, reference in zip(found, expected, strict=True):
        error = ((result.double() - reference).abs().max() / reference.abs().max()).item()
        if not error <= tolerance:
            raise SystemExit(f"Wrong values: error {error:.1e}, allowed {tolerance:.1e}. Nothing was timed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()

    torch.manual_seed(SEED)
    origin = environment(options.device)
    rows = []
    for shape in SHAPES[options.device]:
        for dtype, tolerance in DTYPES[options.device].items():
            h, x, cotangent = (torch.randn(shape, device=options.device).to(dtype) for _ in range(3))
            inputs = [h.requires_grad_(), x.requires_grad_()]
            check(inputs, cotangent, tolerance)
            for name, do in {"forward": infer, "forward+backward": gradients}.items():
                functions = {key: partial(do, function, inputs, cotangent) for key, function in IMPLEMENTATIONS.items()}
                times = paired_milliseconds(functions, options.device, options.repeats)
                for implementation, columns in summarize(times, baseline="definition").items():
                    row = {
                        "op": "symmetric_gate",
                        "pass": name,
                        "shape": "x".join(map(str, shape)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "device": origin["device"],
                        "implementation": implementation,
                        **columns,
                        **origin,
                        "seed": SEED,
                    }
                    rows.append(row)
                    print(*(row[key] for key in ("pass", "shape", "dtype", "implementation", "median_ms", "ratio")))
    write_rows(RESULTS / "symmetric_gate.csv", rows)


if __name__ == "__main__":
    main()
