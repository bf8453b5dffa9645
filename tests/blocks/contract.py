"""What every block promises; a block's test file subclasses `BlockContract` and gives its cases."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter small random values, so that no branch is hidden by a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


class BlockContract:
    """Checks that hold for any block.

    Subclasses set `block` (the class), `cases` (keyword arguments of each form) and `inputs` (batch, size -> inputs,
    where size counts what the block lets vary, along `open_axes`). `output_shape` (case, input) is overridden where it
    is not that of the input.
    """

    block: Callable[..., nn.Module]
    cases: list[dict]
    inputs: Callable[[int, int], Tensor]
    open_axes: tuple[int, ...] = (0, 1)

    def output_shape(self, case: dict, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            ids = ["-".join(map(str, case.values())) for case in self.cases]
            metafunc.parametrize("case", self.cases, ids=ids)

    def make(self, case: dict, **kwargs) -> nn.Module:
        return randomise(self.block(**case, **kwargs)).eval()

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_any_size(self, case, size):
        x = self.inputs(2, size)
        assert self.make(case)(x).shape == self.output_shape(case, x)

    def test_gradients_in_float64(self, case):
        block = self.make(case, dtype=torch.float64)
        names, values = zip(*block.named_parameters())
        x = self.inputs(2, 3).double().requires_grad_()

        def function(x, *values):
            return torch.func.functional_call(block, dict(zip(names, values)), (x,))

        leaves = [value.detach().requires_grad_() for value in values]
        assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)

    def test_every_parameter_gets_a_gradient(self, case):
        block = self.make(case)
        block(self.inputs(2, 5)).square().sum().backward()
        assert [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_device_and_dtype_reach_every_tensor(self, case):
        block = self.block(**case, device="meta", dtype=torch.bfloat16)
        tensors = [*block.parameters(), *block.buffers()]
        assert {t.device.type for t in tensors} <= {"meta"}
        assert {t.dtype for t in block.parameters()} <= {torch.bfloat16}

    def test_samples_do_not_mix(self, case):
        block, x = self.make(case), self.inputs(3, 4)
        torch.testing.assert_close(block(x)[1:2], block(x[1:2]))

    def test_fx_and_script(self, case):
        block, x = self.make(case), self.inputs(2, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(block)
        torch.testing.assert_close(scripted(x), block(x))
        torch.testing.assert_close(fx.symbolic_trace(block)(x), block(x))

    def test_compiles_whole(self, case):
        block, x = self.make(case), self.inputs(2, 5)
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
        expected, found = block(x), compiled(x)
        torch.testing.assert_close(found, expected)
        found.sum().backward()

    def test_export_keeps_sizes_open(self, case):
        block = self.make(case)
        axes = dict.fromkeys(self.open_axes, torch.export.Dim.DYNAMIC)
        program = torch.export.export(block, (self.inputs(2, 6),), dynamic_shapes=(axes,)).module()
        for batch, size in [(1, 3), (3, 11)]:
            x = self.inputs(batch, size)
            torch.testing.assert_close(program(x), block(x))
