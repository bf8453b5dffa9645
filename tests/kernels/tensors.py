"""Arguments of operators: their tensors, changed, counted and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], args) -> tuple:
    return tuple(function(arg) if isinstance(arg, Tensor) else arg for arg in args)


def doubled(args) -> tuple:
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, args)


def require_grad(args) -> tuple:
    return map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), args)


def tensors_of(value) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in values if isinstance(item, Tensor)]


def grad_leaves(args) -> list[Tensor]:
    return [tensor for tensor in tensors_of(args) if tensor.requires_grad]


def by_tensors(function: Callable, args) -> tuple[Callable, tuple[Tensor, ...]]:
    """A function of the floating-point tensors among the arguments alone, and these."""
    places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]

    def of_tensors(*values: Tensor):
        given = dict(zip(places, values))
        return function(*(given.get(place, arg) for place, arg in enumerate(args)))

    # Contiguous, since PyTorch has no dual numbers of expanded tensors.
    return of_tensors, tuple(args[place].contiguous() for place in places)


def squared(value) -> Tensor:
    return sum(tensor.square().sum() for tensor in tensors_of(value))


def sum_of(value) -> Tensor:
    return sum(tensor.sum() for tensor in tensors_of(value))


def describe(value) -> list[tuple]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.stride()) for tensor in tensors_of(value)]


def differentiate(function: Callable, args) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Give outputs and gradients for a fixed random cotangent that is not contiguous."""
    args = require_grad(args)
    outputs = tensors_of(function(*args))
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        # bfloat16 holds these values exactly enough: the float64 definition must see the same cotangent.
        torch.randn(out.shape[::-1], generator=generator).bfloat16().to(out).permute(tuple(range(out.ndim)[::-1]))
        for out in outputs
    ]
    leaves = [tensor for tensor in tensors_of(args) if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [out.detach() for out in outputs], gradients


def expanded(tensor: Tensor) -> Tensor:
    """The first entry of the last axis everywhere."""
    return tensor[..., :1].expand(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """Every second element of memory along each axis."""
    room = tensor.new_zeros([2 * size for size in tensor.shape])[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return room.copy_(tensor)


def permuted(tensor: Tensor) -> Tensor:
    """The same values with memory in the reverse order of axes."""
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)
