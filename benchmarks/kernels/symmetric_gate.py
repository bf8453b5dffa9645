"""Symmetric gate: the operator compared with its definition, in inference and in a training step.

    python -m benchmarks.kernels.symmetric_gate --device cpu

Writes results/symmetric_gate.csv. A form whose values are wrong is not timed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import visionattn.kernels  # noqa: F401  registers the operator
from benchmarks.report import RESULTS, write_rows
from benchmarks.runner import SEED, Implementation, Problem, arguments, measure
from visionattn.kernels.symmetric_gate import symmetric_gate_definition

CASES = {
    "cpu": ["1x48x64x64", "1x48x256x256", "16x48x64x64"],
    "cuda": ["1x48x256x256", "16x48x64x64", "1x48x720x1280"],
}
TOLERANCES = {
    "cpu": {torch.float32: 1e-6, torch.bfloat16: 2e-2},
    "cuda": {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3},
}


class Definition(nn.Module):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return symmetric_gate_definition(h, x)


class Operator(nn.Module):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.ops.visionattn.symmetric_gate(h, x)


def build(module: type[nn.Module], case: str, dtype: torch.dtype, device: str) -> Problem:
    torch.manual_seed(SEED)
    h, x, cotangent = (torch.randn(*map(int, case.split("x"))).to(device, dtype) for _ in range(3))
    return Problem(module(), [h.requires_grad_(), x.requires_grad_()], cotangent)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()

    definition = partial(build, Definition)
    implementations = {
        "definition": Implementation(definition, definition),
        "operator": Implementation(partial(build, Operator), definition),
    }
    rows = []
    for case in CASES[options.device]:
        for dtype, tolerance in TOLERANCES[options.device].items():
            rows += measure(
                "symmetric_gate",
                case,
                implementations,
                baseline="definition",
                dtype=dtype,
                tolerance=tolerance,
                device=options.device,
                repeats=options.repeats,
            )
    write_rows(RESULTS / "symmetric_gate.csv", rows)


if __name__ == "__main__":
    main()
