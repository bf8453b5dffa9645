"""Shared code of the operator files: the kernel switch, input checks, and registration of everything but kernels.

An operator uses its kernels for plain tensors and for first-order reverse-mode derivatives.
Everything else uses the plain definition, which PyTorch can differentiate and batch in any way:
forward-mode tangents, the transforms of `torch.func`, and second derivatives. Any nesting of these gives correct
values, at the definition's cost in time and memory.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._ops import OpOverload
from torch.autograd import forward_ad

from visionattn.errors import InputError
from visionattn.kernels._plain.processor import multiplies_bfloat16

# torch warns at this import if Triton is absent, which is not an error: `kernels_enabled` selects the plain form then.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

__all__ = [
    "DEFINITIONS",
    "EXPORTED",
    "check_alike",
    "gradients",
    "kernels_enabled",
    "register",
    "register_flop_formula",
]

# Forward operator -> plain definition. Every operator file adds its own line.
DEFINITIONS: dict[OpOverload, Callable] = {}

# Forward operator -> another plain form, if there is one that is faster in the runtimes of exported graphs.
EXPORTED: dict[OpOverload, Callable] = {}

_LIBRARY = torch.library.Library("visionattn", "FRAGMENT")


def kernels_enabled(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; otherwise operators use their plain form.

    They run on NVIDIA devices from compute capability 8.0 on, with Triton installed, unless the environment variable
    `VISIONATTN_KERNELS` is `0`. The variable is read at every call.
    """
    return os.environ.get("VISIONATTN_KERNELS") != "0" and device.type == "cuda" and _runs_triton(device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    # ROCm devices are called cuda too; no kernel here was ever compiled for one.
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def check_alike(operator: str, **tensors: Tensor) -> None:
    """Check that all tensors are floating point, of one dtype, on one device.

    Args:
        operator: Name to use in the message.
        tensors: Tensors by their names in the operator's signature.

    Raises:
        InputError: They are not.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) == 1 and next(iter(kinds))[0].is_floating_point:
        return
    given = ", ".join(f"{name}: {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
    raise InputError(
        f"{operator} takes floating-point tensors of one dtype on one device; got {given}. "
        "Convert them with .to(), or run under torch.autocast, which casts them together."
    )


_AUTOCAST = ("cpu", "cuda")


def register(
    operator: str,
    *,
    definition: Callable,
    check: Callable,
    save: Callable,
    differentiate: Callable,
    gradient: Callable | None = None,
    kept: tuple[int, ...] = (),
    exported: Callable | None = None,
    plain_in_bfloat16: bool = False,
) -> None:
    """Register how an operator and its backward pass are differentiated, transformed and autocast.

    Both operators, `<operator>` and `<operator>_backward`, have kernels already.

    Args:
        operator: Name of a forward operator in `torch.ops.visionattn`.
        definition: Plain form of the operator that PyTorch can differentiate; it goes into `DEFINITIONS`.
        check: Called with the operator's arguments, raises `InputError` for invalid ones.
        save: `setup_context` of `torch.library.register_autograd`.
        differentiate: `backward` of `torch.library.register_autograd`; it calls `<operator>_backward`.
        gradient: Plain form of `<operator>_backward` that PyTorch can differentiate. None for the default: it takes the
            cotangents and the operator's arguments, and returns the gradient of each tensor among these.
        kept: Positions of arguments that keep their precision under autocast.
        exported: Plain form for exported graphs. None for the definition.
        plain_in_bfloat16: Differentiate the definition itself on CPUs that multiply bfloat16, where this is faster.
    """
    forward = getattr(torch.ops.visionattn, operator).default
    backward = getattr(torch.ops.visionattn, f"{operator}_backward").default
    DEFINITIONS[forward] = definition
    if exported is not None:
        EXPORTED[forward] = exported
    gradient = gradient or _gradient_of(definition, len(forward._schema.returns))

    def define(*args):
        device = _autocast_device(args)
        if device is None:
            check(*args)
            return widened(definition)(*args)
        with torch.autocast(device, enabled=False):
            return define(*_cast_together(args, kept, device))

    def define_backward(*args):
        device = _autocast_device(args)
        if device is None:
            return gradient(*args)
        with torch.autocast(device, enabled=False):
            return gradient(*args)

    def save_all(ctx, inputs, output) -> None:
        ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in inputs))
        ctx.settings = [None if isinstance(arg, Tensor) else arg for arg in inputs]
        ctx.set_materialize_grads(False)

    def differentiate_again(ctx, *cotangents):
        args = [setting if arg is None else arg for arg, setting in zip(ctx.saved_tensors, ctx.settings)]
        return gradients(gradient, args, cotangents, ctx.needs_input_grad)

    def define_in_bfloat16(*args):
        check(*args)
        return definition(*args)

    in_bfloat16 = define_in_bfloat16 if plain_in_bfloat16 else None
    _register_autograd(forward, Info(differentiate, save), define, in_bfloat16)
    _register_autograd(backward, Info(differentiate_again, save_all), define_backward)
    _register_autocast(forward, backward, kept)


def _register_autograd(
    operator: OpOverload, formula: Info, define: Callable, in_bfloat16: Callable | None = None
) -> None:
    """Differentiate by a formula in reverse mode; otherwise through the plain form.

    `CustomOpDef.register_autograd` checks only `requires_grad`: the kernel would run on the primal values of dual
    tensors, and their tangents would be lost silently.
    """
    differentiate = make_autograd_impl(operator, formula)

    def call(keyset, *args):
        # The level is -1 outside `dual_level`, which is nearly always the case.
        if forward_ad._current_level >= 0 and any(_has_tangent(arg) for arg in args):
            return define(*args)
        if in_bfloat16 is not None and multiplies_bfloat16(args[0]) and _needs_gradient(args):
            return in_bfloat16(*args)
        return differentiate(keyset, *args)

    name = operator._schema.name.removeprefix("visionattn::")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 warns about the intended override
        _LIBRARY.impl(name, call, "Autograd", with_keyset=True, allow_override=True)
    # If a transform of torch.func is active, the operator is dispatched here first; its plain form then meets it.
    _LIBRARY.impl(name, define, "FuncTorchDynamicLayerFrontMode")


def _needs_gradient(args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _has_tangent(value) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _gradient_of(definition: Callable, outputs: int) -> Callable:
    def gradient(*given):
        cotangents, args = given[:outputs], given[outputs:]
        found = gradients(widened(definition), args, cotangents, [isinstance(arg, Tensor) for arg in args])
        return tuple(by_tensor for by_tensor in found if by_tensor is not None)

    return gradient


def gradients(function: Callable, args, cotangents, needed) -> tuple[Tensor | None, ...]:
    """Gradients of a plain function with respect to its `needed` arguments, differentiable themselves.

    Args:
        function: Gives a tensor or a tuple of tensors.
        args: Its arguments.
        cotangents: One for each output, None for zeros.
        needed: A bool for each argument.

    Returns:
        One gradient for each argument, None where it is not needed.
    """
    given_cotangents = [cotangent for cotangent in cotangents if cotangent is not None]
    if not given_cotangents:
        return tuple(torch.zeros_like(arg) if wanted else None for arg, wanted in zip(args, needed))
    positions = [position for position, wanted in enumerate(needed) if wanted]

    def of_needed(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(positions, values))
        outputs = function(*(given.get(position, arg) for position, arg in enumerate(args)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output, cotangent in zip(outputs, cotangents) if cotangent is not None)

    pull_back = torch.func.vjp(of_needed, *(args[position] for position in positions))[1]
    found = iter(pull_back(tuple(given_cotangents)))
    return tuple(next(found) if wanted else None for wanted in needed)


def widened(function: Callable) -> Callable:
    """Let a plain form compute half precision in float32, as kernels do, and round the result."""

    def call(*args):
        dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        outputs = function(*(arg.float() if _is_half(arg) else arg for arg in args))
        return tuple(output.to(dtype) for output in outputs) if isinstance(outputs, tuple) else outputs.to(dtype)

    return call


def _is_half(value) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _register_autocast(forward: OpOverload, backward: OpOverload, kept: tuple[int, ...]) -> None:
    """Cast the inputs of an operator together under `torch.autocast`, to its current dtype.

    Under autocast a block receives low-precision activations and float32 parameters. Float64 tensors are left
    unchanged, as in PyTorch's own rules. (`torch.library.register_autocast` would fix the dtype at registration.)
    The backward operator, if it runs under autocast too, uses what the forward pass saved, and disables autocast.
    """

    def register(device: str) -> None:
        def cast_and_call(*args):
            with torch.autocast(device, enabled=False):
                return forward(*_cast_together(args, kept, device))

        def call(*args):
            with torch.autocast(device, enabled=False):
                return backward(*args)

        for operator, function in ((forward, cast_and_call), (backward, call)):
            name = operator._schema.name.removeprefix("visionattn::")
            _LIBRARY.impl(name, function, f"Autocast{device.upper()}")

    for device in _AUTOCAST:
        register(device)


def _autocast_device(args) -> str | None:
    """Device type of the arguments if autocast is on for it."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    return device if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


def _cast_together(args, kept: tuple[int, ...], device: str) -> list:
    dtype = torch.get_autocast_dtype(device)
    return [arg if position in kept else _cast(arg, dtype) for position, arg in enumerate(args)]


def _cast(value, dtype: torch.dtype):
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value
