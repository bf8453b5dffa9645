"""Subspace attention of ULSAM, all subspaces at once, compared with one branch per subspace.

    python -m benchmarks.kernels.subspace_attention --device cpu

Writes results/subspace_attention.csv. A form whose values are wrong is not timed.

Forms:
    branches  the layers of each subspace one after the other, with PyTorch's convolutions, pool and batch norm, and a
              concatenation at the end: how ULSAM is published
    grouped   visionattn.blocks.SubspaceAttention

In a training step the module form takes statistics of the batch. Its two biases before batch norm, whose gradient is 0,
are frozen: their gradients consist of rounding errors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import RESULTS, write_rows
from benchmarks.runner import SEED, Implementation, Problem, arguments, measure
from visionattn.blocks import SubspaceAttention

# Of two nearly equal values in a window, either can have the gradient.
DTYPES = {"cpu": (torch.float32, 1e-4), "cuda": (torch.bfloat16, 4e-2)}


@dataclass(frozen=True)
class Case:
    """Maps, and the form of the block."""

    batch: int
    channels: int
    side: int
    form: str = "paper"
    subspaces: int = 4

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}, {self.form} form, {self.subspaces} subspaces"


CASES = {
    "cpu": [
        Case(16, 512, 14),
        Case(16, 512, 14, subspaces=16),
        Case(16, 512, 14, "module"),
        Case(8, 128, 56),
        Case(8, 128, 56, "module"),
        Case(1, 512, 14),
    ],
    # The module form's branches lose too much to their batch norms in half precision to be compared.
    "cuda": [Case(256, 512, 14), Case(256, 512, 14, subspaces=16), Case(64, 128, 56)],
}


class Branches(SubspaceAttention):
    """The same parameters, used subspace by subspace."""

    def forward(self, x: Tensor) -> Tensor:
        g = self.point.shape[0]
        shifts = [None] * g if self.shift is None else self.shift.chunk(g)
        offsets = [None] * g if self.offset is None else self.offset.chunk(g)
        norms, norms_logits = self.parts(self.norm), self.parts(self.norm_logits)
        out = []
        for n, (part, scale) in enumerate(zip(x.chunk(g, 1), self.scale.chunk(g))):
            t = F.conv2d(part, scale.view(-1, 1, 1, 1), shifts[n], groups=part.shape[1])
            t = F.max_pool2d(self.normalise(t, norms[n]), 3, stride=1, padding=1)
            s = self.normalise(F.conv2d(t, self.point[n, None, :, None, None], offsets[n]), norms_logits[n])
            out.append(part + part * s.flatten(1).softmax(1).view(s.shape))
        return torch.cat(out, 1)

    def parts(self, norm: nn.BatchNorm2d | None) -> list:
        """Running mean and variance, weight and bias of each subspace."""
        g = self.point.shape[0]
        if norm is None:
            return [None] * g
        return list(zip(*(v.chunk(g) for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))))

    def normalise(self, x: Tensor, norm: tuple | None) -> Tensor:
        return x if norm is None else F.batch_norm(x, *norm, training=self.training, momentum=0.9).relu()


def build(block: type[SubspaceAttention], case: Case, dtype: torch.dtype, device: str) -> Problem:
    torch.manual_seed(SEED)
    module = block(case.channels, case.subspaces, case.form)
    for bias in (module.shift, module.offset):
        if bias is not None:
            bias.requires_grad_(False)
    x, cotangent = torch.randn(2, case.batch, case.channels, case.side, case.side).to(device, dtype)
    return Problem(module.to(device, dtype), [x.requires_grad_()], cotangent)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    branches = partial(build, Branches)
    forms = {
        "branches": Implementation(branches, branches),
        "grouped": Implementation(partial(build, SubspaceAttention), branches),
    }
    rows, (dtype, tolerance) = [], DTYPES[options.device]
    for case in CASES[options.device]:
        rows += measure(
            "subspace_attention", case, forms, "branches", dtype, tolerance, options.device, options.repeats
        )
    write_rows(RESULTS / "subspace_attention.csv", [{"part": "block", **row} for row in rows])


if __name__ == "__main__":
    main()
