"""What the operator files share: the kernel switch, input checks, autocast and the table of definitions."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from visionattn.errors import InputError

# torch warns at this import where Triton is absent, which is no fault: `kernels_enabled` takes the plain form there.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

__all__ = ["DEFINITIONS", "check_alike", "kernels_enabled", "register_autocast", "register_flop_formula"]

# Forward operator -> plain definition. Every operator file adds its own line.
DEFINITIONS: dict[OpOverload, Callable] = {}

_LIBRARY = torch.library.Library("visionattn", "FRAGMENT")


def kernels_enabled(device: torch.device) -> bool:
    """Tell whether Triton kernels run on a device; where they do not, operators take their plain form.

    They run on NVIDIA devices from compute capability 8.0 on, with Triton installed, unless the environment variable
    `VISIONATTN_KERNELS` is `0`. The variable is read at every call.
    """
    return os.environ.get("VISIONATTN_KERNELS") != "0" and device.type == "cuda" and _runs_triton(device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    # ROCm devices call themselves cuda too; no kernel here was ever compiled for one.
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def check_alike(operator: str, **tensors: Tensor) -> None:
    """Check that all tensors are floating point, of one dtype, on one device.

    Args:
        operator: Name to use in the message.
        tensors: Tensors under the names that the operator's signature gives them.

    Raises:
        InputError: They are not.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) == 1 and next(iter(kinds))[0].is_floating_point:
        return
    given = ", ".join(f"{name}: {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
    raise InputError(
        f"{operator} takes floating-point tensors of one dtype on one device, but got {given}. "
        "Convert them with .to(), or run under torch.autocast, which casts them together."
    )


def register_autocast(operator: str, kept: tuple[int, ...] = ()) -> None:
    """Let an operator cast its inputs together under `torch.autocast`, to the dtype that is in force there.

    Under autocast a block receives low-precision activations beside float32 parameters. Float64 tensors are left
    alone, as in PyTorch's own rules. (`torch.library.register_autocast` would fix the dtype at registration.)
    `<operator>_backward`, if it runs under autocast too, takes what the forward pass kept, and computes without it.

    Args:
        operator: Name of a forward operator in `torch.ops.visionattn`.
        kept: Places of arguments that keep their precision.
    """
    forward, backward = (getattr(torch.ops.visionattn, name) for name in (operator, f"{operator}_backward"))

    def register(device: str) -> None:
        def cast_and_call(*args):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return forward(*(arg if place in kept else _cast(arg, dtype) for place, arg in enumerate(args)))

        def call(*args):
            with torch.autocast(device, enabled=False):
                return backward(*args)

        _LIBRARY.impl(operator, cast_and_call, f"Autocast{device.upper()}")
        _LIBRARY.impl(f"{operator}_backward", call, f"Autocast{device.upper()}")

    register("cpu")
    register("cuda")


def _cast(value, dtype: torch.dtype):
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value
