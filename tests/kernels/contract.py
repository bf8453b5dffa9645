"""What every operator of `torch.ops.visionattn` promises, as tests to inherit.

A new operator's test is a subclass named `Test<Operator>` that says what the operator is; its own file then tests only
its own mathematics. `test_every_operator.py` fails for an operator without a subclass.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.forking import run
from tests.kernels.tensors import describe, differentiate, doubled, map_tensors, require_grad, sum_of, tensors_of
from tests.kernels.transforms import DEVICES, DTYPES, DerivativeContract
from visionattn.errors import InputError
from visionattn.kernels import decompositions

# Bytes that a block may have on the smallest chip that kernels run on (compute capability 8.6).
SHARED_MEMORY = 99 * 1024


# Bytes that a thread may spill: none. Triton 3.6 spills 8 in the bfloat16 backward pass of match attention.
SPILLED = 8 if importlib.util.find_spec("triton") and Version(version("triton")) < Version("3.9") else 0


class OperatorContract(DerivativeContract):
    """Checks that hold for every operator. A subclass gives the attributes.

    Attributes:
        name: The operator's name in `torch.ops.visionattn`. It is also the name of its file in `visionattn.kernels`
            and of its Triton file, if it has one, whose `forward` and `backward` take what the operator and
            `<name>_backward` take.
        definition: The plain definition, as a `staticmethod`.
        module: Class of a module whose forward has the operator's typed arguments and calls it as a block does. Its
            file must not postpone annotations: TorchScript cannot read them from an fx trace then.
        tolerance: Largest error of each dtype, as a share of the float64 result's largest magnitude, or of 1 if less.
        samples: Method (dtype, device) -> lists of arguments: two small typical ones that differ in all sizes, then odd
            shapes and strides.
    """

    name: str
    definition: Callable
    module: type[nn.Module]
    tolerance: dict[torch.dtype, float]
    samples: Callable[..., list[tuple]]

    def interpreter_samples(self, dtype: torch.dtype) -> list[tuple]:
        """Give the arguments that run in Triton's interpreter; override where all samples would take too long."""
        return self.samples(dtype, "cpu")

    @property
    def operator(self):
        return getattr(torch.ops.visionattn, self.name)

    def check_values(self, samples: list[tuple], tolerance: float) -> None:
        """Compare outputs and every gradient with the definition in float64."""
        for args in samples:
            outputs, gradients = differentiate(self.operator, args)
            expected_outputs, expected_gradients = differentiate(self.definition, doubled(args))
            dtype = next(arg.dtype for arg in tensors_of(args) if arg.is_floating_point())
            for kind, found, expected in [
                *(("output", *pair) for pair in zip(outputs, expected_outputs, strict=True)),
                *(("gradient", *pair) for pair in zip(gradients, expected_gradients, strict=True)),
            ]:
                assert found.dtype == dtype
                limit = tolerance * max([1.0, *expected.abs().flatten().tolist()])
                torch.testing.assert_close(
                    found.double(),
                    expected,
                    rtol=0,
                    atol=limit,
                    msg=lambda text, kind=kind, args=args: f"{kind} for {describe(args)}: {text}",
                )

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_definition(self, dtype, device):
        self.check_values(self.samples(dtype, device), self.tolerance[dtype])

    @pytest.mark.parametrize("device", DEVICES)
    def test_writes_every_element(self, device):
        with poisoned_memory():
            self.check_values(self.samples(torch.float32, device), self.tolerance[torch.float32])

    @pytest.mark.parametrize("device", DEVICES)
    def test_switch_takes_the_plain_form(self, device, monkeypatch):
        monkeypatch.setenv("VISIONATTN_KERNELS", "0")
        # None in sys.modules makes an import of the Triton file fail.
        monkeypatch.setitem(sys.modules, f"visionattn.kernels._triton.{self.name}", None)
        self.check_values(self.samples(torch.float32, device), self.tolerance[torch.float32])

    def test_gradcheck(self):
        args = require_grad(self.samples(torch.float64, "cpu")[0])
        assert torch.autograd.gradcheck(self.operator, args, fast_mode=True)

    @pytest.mark.parametrize("device", DEVICES)
    def test_opcheck(self, device):
        for args in self.samples(torch.float32, device):
            torch.library.opcheck(self.operator.default, require_grad(args))

    @pytest.mark.parametrize("device", DEVICES)
    def test_fake_and_meta_agree_with_real(self, device):
        for dtype in DTYPES:
            for args in self.samples(dtype, device):
                real = describe(self.operator(*args))
                with FakeTensorMode() as mode:
                    fake = describe(self.operator(*map_tensors(mode.from_tensor, args)))
                meta = describe(self.operator(*map_tensors(lambda tensor: tensor.to("meta"), args)))
                assert real == fake == meta

    def test_refuses_what_it_cannot_take(self):
        first, *rest = self.samples(torch.float32, "cpu")[0]
        for wrong in (first.double(), first.long(), first.to(torch.complex64), first.to("meta")):
            with pytest.raises(InputError, match=self.name):
                self.operator(wrong, *rest)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_casts_inputs_together(self, dtype, device):
        args = self.samples(dtype, device)[0]
        mixed = (args[0], *map_tensors(Tensor.float, args[1:]))
        mixed = require_grad(mixed)
        with torch.autocast(device, dtype=dtype):
            out = self.operator(*mixed)
            inside = torch.autograd.grad(sum_of(out), tensors_of(mixed), retain_graph=True)
        torch.testing.assert_close(out, self.operator(*args), rtol=0, atol=0)
        gradients = torch.autograd.grad(sum_of(out), tensors_of(mixed))
        torch.testing.assert_close(inside, gradients, rtol=0, atol=0)
        assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors_of(mixed)]

    def test_fx_and_torchscript(self):
        args = self.samples(torch.float32, "cpu")[0]
        module, expected = self.module(), self.operator(*args)
        traced = torch.fx.symbolic_trace(module)
        extracted = create_feature_extractor(module, {get_graph_node_names(module)[0][-1]: "out"})
        torch.testing.assert_close(extracted(*args)["out"], expected, rtol=0, atol=0)
        for way in (traced, torch.jit.script(module), torch.jit.script(traced)):
            torch.testing.assert_close(way(*args), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("device", DEVICES)
    def test_compiles_as_one_graph(self, device):
        args = self.samples(torch.float32, device)[0]
        compiled = torch.compile(self.module(), fullgraph=True)
        torch.testing.assert_close(differentiate(compiled, args), differentiate(self.operator, args))

    @pytest.mark.parametrize("device", DEVICES)
    def test_checkpointing_changes_nothing(self, device):
        args = self.samples(torch.float32, device)[0]
        found = differentiate(lambda *args: checkpoint(self.operator, *args, use_reentrant=False), args)
        torch.testing.assert_close(found, differentiate(self.operator, args), rtol=0, atol=0)

    def test_exports_without_the_operator(self):
        args, others = self.samples(torch.float32, "cpu")[:2]
        sizes = tuple(
            dict.fromkeys(range(arg.ndim), torch.export.Dim.AUTO) if isinstance(arg, Tensor) else None for arg in args
        )
        program = torch.export.export(self.module(), args, dynamic_shapes=sizes)
        assert any("visionattn" in str(node.target) for node in program.graph.nodes)
        program = program.run_decompositions(decompositions())
        assert not any("visionattn" in str(node.target) for node in program.graph.nodes)
        # At other sizes too: a baked size would pass at the first.
        form = decompositions()[getattr(torch.ops.visionattn, self.name).default]
        for inputs in (args, others):
            torch.testing.assert_close(program.module()(*inputs), form(*inputs), rtol=0, atol=0)
            torch.testing.assert_close(form(*inputs), self.definition(*inputs))

    def test_counts_the_flops_of_its_definition(self):
        for args in self.samples(torch.float32, "cpu"):
            assert count_flops(self.operator, args) == count_flops(self.definition, args)

    def test_triton_kernels_in_the_interpreter(self):
        pytest.importorskip("triton", reason="Triton is not installed")
        if importlib.util.find_spec(f"visionattn.kernels._triton.{self.name}") is None:
            pytest.skip(f"{self.name} has no Triton kernels")
        # Triton decides at import whether it interprets, hence a process of its own.
        test = type(self)
        code = f"from {test.__module__} import {test.__name__}; {test.__name__}().interpret()"
        process = run(code, TRITON_INTERPRET="1")
        assert process.returncode == 0, process.stderr
        assert process.stdout.endswith("interpreted\n")

    @pytest.mark.parametrize("capability", [80, 90, 100])
    def test_compiles_without_spilling(self, capability, tmp_path):
        pytest.importorskip("triton", reason="Triton is not installed")
        from benchmarks.kernels import aot, kernel_resources

        cases = [case for case in kernel_resources.CASES.get(self.name, list)() if case.in_tests]
        has_kernels = importlib.util.find_spec(f"visionattn.kernels._triton.{self.name}") is not None
        assert bool(cases) == has_kernels
        for case in cases:
            if capability not in case.chips:
                continue
            compiled = aot.compile_for(case.kernel, case.types, case.constants, capability, **case.options)
            assert bool(aot.tensor_core_instructions(compiled)) == case.dots, case
            try:
                used = aot.resources(compiled, tmp_path)
            except FileNotFoundError:
                pytest.skip("this Triton wheel has no cuobjdump")
            assert used.stack + used.local <= SPILLED, case
            assert used.shared <= SHARED_MEMORY, case

    def interpret(self) -> None:
        """Let the Triton launchers serve CPU tensors, in a process with `TRITON_INTERPRET=1`, and compare values."""
        kernels = importlib.import_module(f"visionattn.kernels._triton.{self.name}")
        torch.library.register_kernel(f"visionattn::{self.name}", "cpu", kernels.forward)
        torch.library.register_kernel(f"visionattn::{self.name}_backward", "cpu", kernels.backward)
        patch_the_language_once()
        with poisoned_memory(), bfloat16_in_the_interpreter():
            self.check_kernels()
        print("interpreted")

    def check_kernels(self) -> None:
        """Compare values of the kernels: of all samples in float32, of a few in half precisions."""
        for dtype, count in ((torch.float32, None), (torch.bfloat16, 3), (torch.float16, 3)):
            self.check_values(self.interpreter_samples(dtype)[:count], self.tolerance[dtype])


def count_flops(function: Callable, args) -> int:
    args = require_grad(args)
    with FlopCounterMode(display=False) as counter:
        sum_of(function(*args)).backward()
    return counter.get_total_flops()


def patch_the_language_once() -> None:
    """Let Triton's interpreter patch each language module once and for all: it does at each call of a function."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_what_is_new(fn):
        seen = {name for name, module in (("tl", tl), ("core", tl.core)) if module in fn.__globals__.values()}
        if not seen <= patched:
            patch(fn)
            patched.update(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_what_is_new


@contextmanager
def bfloat16_in_the_interpreter():
    """Make bfloat16 of other numbers, and products of it: Triton's interpreter has its bits as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_by_float32(self, source, kind):
        if kind.scalar == tl.bfloat16 and not source.dtype.scalar.is_floating():
            source = cast(self, source, tl.float32)
        return cast(self, source, kind)

    def widened(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        return TensorHandle((factor.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot_in_float32(self, left, right, *rest):
        return dot(self, widened(left), widened(right), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_by_float32, dot_in_float32
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


@contextmanager
def poisoned_memory():
    """Fill all memory that PyTorch allocates without writing to it with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
