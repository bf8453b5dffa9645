"""Operators: one a file, each with its definition, its kernels and its registration in `torch.ops.visionattn`.

Blocks call `torch.ops.visionattn.<operator>(...)`, which torch.fx, TorchScript, torch.compile and torch.export take as
one node. An exporter that must not see our operators replaces them by their definitions:

    program = torch.export.export(model, args).run_decompositions(visionattn.kernels.decompositions())
"""

from __future__ import annotations

from collections.abc import Callable

from torch._ops import OpOverload

# One line an operator: importing the file registers it.
from visionattn.kernels import (  # noqa: F401
    halo_attention,
    match_attention,
    multi_query_pool,
    subspace_attention,
    symmetric_gate,
)
from visionattn.kernels._operator import DEFINITIONS, kernels_enabled

__all__ = ["decompositions", "kernels_enabled"]


def decompositions() -> dict[OpOverload, Callable]:
    """Give the table of operators and plain definitions for `ExportedProgram.run_decompositions`.

    It holds our operators alone, so the core ATen operators of a program stay as they are.
    """
    return dict(DEFINITIONS)
