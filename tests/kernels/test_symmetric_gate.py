"""The symmetric gate: the operator contract and the gate's own mathematics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.contract import OperatorContract
from visionattn.errors import InputError
from visionattn.kernels import _operator
from visionattn.kernels.symmetric_gate import symmetric_gate_definition

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Gate(nn.Module):
    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.ops.visionattn.symmetric_gate(h, x)


class TestSymmetricGate(OperatorContract):
    name = "symmetric_gate"
    definition = staticmethod(symmetric_gate_definition)
    module = Gate
    tolerance = TOLERANCE

    def samples(self, dtype, device):
        generator = torch.Generator().manual_seed(0)

        def pair(*shape):
            return tuple((3 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in "hx")

        h, x = pair(2, 6, 5, 7)
        return [
            (h, x),
            pair(3, 4, 11, 9),
            # Several Triton blocks, the last one ragged.
            pair(3, 5, 401),
            (h.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)),
            (h.to(memory_format=torch.channels_last), x),
            (h, x.transpose(0, 1).contiguous().transpose(0, 1)),
            (h[:, 1::2, :, 2:], x[:, ::2, :, :5]),
            (h.permute(3, 1, 0, 2)[..., 1:], x.permute(3, 1, 0, 2)[..., 1:]),
            (h[:1].expand(3, -1, -1, -1), x[:1].expand(3, -1, -1, -1)),
            pair(0, 4),
            pair(),
        ]


@pytest.mark.parametrize("native", [True, False])
def test_both_ways_of_bfloat16_gradients(native, monkeypatch):
    """On CPUs that multiply bfloat16 autograd differentiates the definition, whose arguments are checked as ever."""
    monkeypatch.setattr(_operator, "multiplies_bfloat16", lambda x: native and x.dtype == torch.bfloat16)
    test = TestSymmetricGate()
    test.check_values(test.samples(torch.bfloat16, "cpu"), TOLERANCE[torch.bfloat16])
    h, x = (tensor.requires_grad_() for tensor in test.samples(torch.bfloat16, "cpu")[0])
    out = torch.ops.visionattn.symmetric_gate(h, x)
    assert ("symmetric_gate" in type(out.grad_fn).__name__) == (not native)
    with torch.no_grad():
        torch.testing.assert_close(torch.ops.visionattn.symmetric_gate(h, x), out, rtol=0, atol=0)
    with pytest.raises(InputError, match="Nothing is broadcast"):
        torch.ops.visionattn.symmetric_gate(h, x[:1])


def gate(h, x=0.0):
    h = torch.as_tensor(h, dtype=torch.float64)
    return torch.ops.visionattn.symmetric_gate(h, torch.as_tensor(x, dtype=torch.float64).expand_as(h))


def test_known_values():
    # sigmoid(ln 3) = 3/4, so the gate is 1/4.
    assert gate(torch.log(torch.tensor(3.0, dtype=torch.float64)), 5.0).item() == pytest.approx(
        (1.0986122886681098 + 5) / 4
    )
    assert gate(0.0, 7.0).item() == 0.0


def test_gate_is_odd():
    h, x = torch.randn(2, 50, dtype=torch.float64)
    # The factor is odd in h, so turning both signs leaves the product, and with x = 0 it is even in h.
    torch.testing.assert_close(gate(-h, -x), gate(h, x))
    torch.testing.assert_close(gate(-h), gate(h))


def test_saturates_without_nan():
    h = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    out = torch.ops.visionattn.symmetric_gate(h, torch.ones(4))
    torch.testing.assert_close(out, torch.tensor([9999 / 2, 199 / 2, 201 / 2, 10001 / 2]))
    out.sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([-0.5, -0.5, 0.5, 0.5]))


def test_keeps_channels_last():
    h, x = torch.randn(2, 2, 8, 4, 6).unbind()
    out = torch.ops.visionattn.symmetric_gate(*(a.to(memory_format=torch.channels_last) for a in (h, x)))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_broadcast():
    with pytest.raises(InputError, match=r"h: \(2, 3\), x: \(1, 3\)"):
        torch.ops.visionattn.symmetric_gate(torch.ones(2, 3), torch.ones(1, 3))


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=5), seed=st.integers(0, 999), data=st.data())
def test_any_shape_and_layout(shape, seed, data):
    generator = torch.Generator().manual_seed(seed)
    layouts = st.permutations(range(len(shape)))
    h, x = (torch.randn(shape, generator=generator, dtype=torch.float64).permute(data.draw(layouts)) for _ in range(2))
    x = x.reshape(h.shape)
    out = torch.ops.visionattn.symmetric_gate(h, x)
    torch.testing.assert_close(out, symmetric_gate_definition(h, x))
    assert out.stride() == torch.empty_like(h).stride()


def test_accesses_memory_16_bytes_at_a_time():
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.kernels import aot, kernel_resources

    for case in kernel_resources.symmetric_gate_cases():
        ptx = aot.compile_for(case.kernel, case.types, case.constants).asm["ptx"]
        assert ".global.v4.b32" in ptx
        assert ".global.b" not in ptx
