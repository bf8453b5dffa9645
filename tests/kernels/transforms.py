"""How operators are differentiated and batched beyond a backward pass, as tests for `OperatorContract`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from tests.kernels.tensors import (
    by_tensors,
    doubled,
    expanded,
    grad_leaves,
    map_tensors,
    permuted,
    require_grad,
    squared,
    strided,
    sum_of,
    tensors_of,
)
from visionattn.errors import InputError

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tangents_of(primals) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in primals)


def all_of(primals) -> tuple[int, ...]:
    return tuple(range(len(primals)))


def jacobian_forward(function, primals):
    """Over two numbers that scale and shift the last tensor."""
    return func.jacfwd(lambda by: function(*primals[:-1], by[0] * primals[-1] + by[1]))(primals[0].new_tensor([1, 0]))


def jacobian_reverse(function, primals):
    """Of two numbers for each output."""

    def totals(x: Tensor) -> list[Tensor]:
        return [torch.stack([y.sum(), y.square().sum()]) for y in tensors_of(function(*primals[:-1], x))]

    return func.jacrev(totals)(primals[-1])


def batched_over_the_first_axis(function, primals):
    return torch.vmap(function)(*(torch.stack([x, x + 1]) for x in primals))


def batched_over_the_last_axis(function, primals):
    return torch.vmap(function, in_dims=-1)(*(torch.stack([x, x + 1], -1) for x in primals))


def batched_parameters(function, primals):
    stacked = (torch.stack([x, x + 1]) for x in primals[1:])
    return torch.vmap(function, in_dims=(None, *[0] * (len(primals) - 1)))(primals[0], *stacked)


def batched_alone(function, primals):
    """Over each tensor, with the others shared."""
    found = []
    for index, x in enumerate(primals):
        axes = [0 if other == index else None for other in all_of(primals)]
        stacked = [*primals[:index], torch.stack([x, x + 1]), *primals[index + 1 :]]
        found.append(torch.vmap(function, in_dims=tuple(axes))(*stacked))
    return found


def gradient(function, primals):
    return func.grad(lambda *values: squared(function(*values)), all_of(primals))(*primals)


def gradients_of_samples(function, primals):
    stacked = (torch.stack([x, x + 1]) for x in primals)
    return torch.vmap(func.grad(lambda *values: squared(function(*values)), all_of(primals)))(*stacked)


def vector_jacobian(function, primals):
    outputs, pull_back = func.vjp(function, *primals)
    return pull_back(outputs)


def hessian_vector_forward_over_reverse(function, primals):
    return func.jvp(lambda *values: gradient(function, values), primals, tangents_of(primals))


def hessian_vector_reverse_over_reverse(function, primals):
    _, pull_back = func.vjp(lambda *values: gradient(function, values), *primals)
    return pull_back(tangents_of(primals))


def autograd_functional(function, primals):
    hvp = torch.autograd.functional.hvp(lambda *values: squared(function(*values)), primals, tangents_of(primals))
    return hvp, torch.autograd.functional.jvp(function, primals, tangents_of(primals))


def batched_cotangents(function, primals):
    leaves = [x.detach().requires_grad_() for x in primals]
    outputs = tensors_of(function(*leaves))
    cotangents = [torch.stack([torch.ones_like(x), x.detach()]) for x in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, is_grads_batched=True)


TRANSFORMS = [
    jacobian_forward,
    jacobian_reverse,
    batched_over_the_first_axis,
    batched_over_the_last_axis,
    batched_parameters,
    batched_alone,
    gradient,
    gradients_of_samples,
    vector_jacobian,
    hessian_vector_forward_over_reverse,
    hessian_vector_reverse_over_reverse,
    autograd_functional,
    batched_cotangents,
]


def along_cotangents(function: Callable, args) -> list[tuple]:
    outputs, leaves = tensors_of(function(*args)), grad_leaves(args)
    with forward_ad.dual_level():
        cotangents = [forward_ad.make_dual(torch.ones_like(x), x.detach()) for x in outputs]
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
        return [tuple(forward_ad.unpack_dual(x)) for x in gradients]


def second_derivatives(function: Callable, args) -> tuple[Tensor, ...]:
    args = require_grad(args)
    first = torch.autograd.grad(sum_of(function(*args)), grad_leaves(args), create_graph=True)
    return torch.autograd.grad(sum_of(first), grad_leaves(args))


class DerivativeContract:
    """Second derivatives, forward mode, transforms of `torch.func`; attributes are those of `OperatorContract`."""

    def test_second_derivatives(self):
        args = require_grad(self.samples(torch.float64, "cpu")[0])
        assert torch.autograd.gradgradcheck(self.operator, args, fast_mode=True)

    def test_second_derivatives_of_half_precisions(self):
        for dtype in (torch.bfloat16, torch.float16):
            args = self.samples(dtype, "cpu")[0]
            expected = second_derivatives(self.definition, doubled(args))
            for found, right in zip(second_derivatives(self.operator, args), expected, strict=True):
                assert found.dtype == dtype
                limit = self.tolerance[dtype] * max([1.0, *right.abs().flatten().tolist()])
                torch.testing.assert_close(found.double(), right, rtol=0, atol=limit)

    def test_cotangents_and_arguments_of_any_layout(self):
        """Expanded, strided and permuted: the values are those for contiguous tensors."""
        args = self.samples(torch.float64, "cpu")[0]
        for change in (expanded, strided, permuted):
            args_of = require_grad(map_tensors(change, args))
            dense = require_grad(map_tensors(Tensor.contiguous, args_of))
            outputs = tensors_of(self.operator(*args_of))
            torch.testing.assert_close(outputs, tensors_of(self.operator(*dense)), rtol=0, atol=1e-12)
            cotangents = [change(torch.randn_like(output)) for output in outputs]
            found, expected = (
                torch.autograd.grad(tensors_of(self.operator(*of)), grad_leaves(of), given)
                for of, given in ((args_of, cotangents), (dense, [x.contiguous() for x in cotangents]))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    def test_gradients_of_some_arguments_alone(self):
        args = self.samples(torch.float64, "cpu")[0]
        for one in range(len(grad_leaves(require_grad(args)))):
            chosen = require_grad(args)
            leaves = grad_leaves(chosen)
            expected = torch.autograd.grad(squared(self.operator(*chosen)), leaves)[one]
            for place, leaf in enumerate(leaves):
                leaf.requires_grad_(place == one)
            (found,) = torch.autograd.grad(squared(self.operator(*chosen)), leaves[one])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("device", DEVICES)
    def test_forward_mode(self, device):
        """Dual numbers and `torch.func.jvp`, each dtype against the definition in float64."""
        for dtype in DTYPES:
            for args in self.samples(dtype, device)[:4]:
                function, primals = by_tensors(self.operator, args)
                tangents = [torch.randn(x.shape, device=device).bfloat16().to(dtype) for x in primals]
                plain, primals_64 = by_tensors(self.definition, doubled(args))
                _, expected = torch.func.jvp(plain, primals_64, tuple(x.double() for x in tangents))
                _, by_func = torch.func.jvp(function, primals, tuple(tangents))
                with forward_ad.dual_level():
                    outputs = tensors_of(function(*map(forward_ad.make_dual, primals, tangents)))
                    by_duals = [forward_ad.unpack_dual(output).tangent for output in outputs]
                for found in (tensors_of(by_func), by_duals):
                    for tangent, right in zip(found, tensors_of(expected), strict=True):
                        assert tangent.dtype == primals[0].dtype
                        limit = self.tolerance[dtype] * max([1.0, *right.abs().flatten().tolist()])
                        torch.testing.assert_close(tangent.double(), right, rtol=0, atol=limit)

    def test_transforms(self):
        """Transforms of `torch.func`, nested ones too, against those of the definition."""
        args = self.samples(torch.float64, "cpu")[0]
        for transform in TRANSFORMS:
            found, expected = (transform(*by_tensors(function, args)) for function in (self.operator, self.definition))
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, t=transform: f"{t.__name__}: {text}"
            )

    def test_forward_mode_over_the_backward_pass(self):
        """Tangents of cotangents alone: the forward pass ran before there was a dual number."""
        args = self.samples(torch.float64, "cpu")[0]
        found, expected = (
            along_cotangents(function, require_grad(args)) for function in (self.operator, self.definition)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_transforms_check_their_inputs(self):
        first, *rest = self.samples(torch.float32, "cpu")[0]
        for wrong in (first.double(), first.to(torch.complex64)):
            with pytest.raises(InputError, match=self.name):
                torch.vmap(lambda x: self.operator(x, *rest))(torch.stack([wrong, wrong]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_transforms_under_autocast(self, dtype):
        args = self.samples(dtype, "cpu")[0]
        function, primals = by_tensors(self.operator, args)
        tangents = tuple(torch.randn(x.shape).to(x) for x in primals)
        expected = torch.func.jvp(function, primals, tangents)
        with torch.autocast("cpu", dtype=dtype):
            # What autocast casts would have been float32 at first.
            found = torch.func.jvp(
                function, (primals[0], *map(Tensor.float, primals[1:])), (tangents[0], *map(Tensor.float, tangents[1:]))
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
