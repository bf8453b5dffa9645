"""Operators, one per file, each with its definition, its kernels and its registration in `torch.ops.visionattn`.

Blocks call `torch.ops.visionattn.<operator>(...)`, which torch.fx, TorchScript, torch.compile and torch.export treat as
one node. For exporters that do not support our operators, replace them by plain PyTorch:

    program = torch.export.export(model, args).run_decompositions(visionattn.kernels.decompositions())
"""

from __future__ import annotations

from collections.abc import Callable

from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

# One line per operator: importing the file registers it.
from visionattn.kernels import (  # noqa: F401
    halo_attention,
    match_attention,
    multi_query_pool,
    subspace_attention,
    symmetric_gate,
)
from visionattn.kernels._operator import DEFINITIONS, EXPORTED, kernels_enabled

__all__ = ["PlainForms", "decompositions", "kernels_enabled"]


def decompositions() -> dict[OpOverload, Callable]:
    """Table of operators and their plain definitions, or plain forms for exported graphs, for `run_decompositions`.

    It contains our operators only, so the core ATen operators of a program stay unchanged.
    """
    return DEFINITIONS | EXPORTED


class PlainForms(TorchFunctionMode):
    """Within this context every operator is traced as its plain definition, or as its plain form for exported graphs.

    A program traced in this context needs no `run_decompositions(decompositions())`, a second pass over its graph that
    takes longer than tracing with symbolic sizes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace operators by their plain form; call all other functions unchanged."""
        operator = getattr(func, "default", func)  # `torch.ops.visionattn.<operator>` has one overload
        function = decompositions().get(operator, func) if isinstance(operator, OpOverload) else func
        return function(*args, **(kwargs or {}))
