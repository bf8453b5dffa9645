"""Multi-query pooling: the operator contract, a loop-written definition, masks, int8, and what frozen tokens save."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.contract import OperatorContract, poisoned_memory
from tests.kernels.tensors import differentiate
from visionattn.errors import InputError
from visionattn.kernels import decompositions
from visionattn.kernels._plain import multi_query_pool as plain
from visionattn.kernels._plain.processor import multiplies_bfloat16
from visionattn.kernels.multi_query_pool import multi_query_pool_definition

INT8 = torch.zeros(2, 7, 5, dtype=torch.int8)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
operator = torch.ops.visionattn.multi_query_pool


class Pool(nn.Module):
    def forward(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.visionattn.multi_query_pool(x, q)


class WholePool(nn.Module):
    def forward(
        self, x: Tensor, q: Tensor, mask: Tensor | None = None, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.visionattn.multi_query_pool(x, q, mask, scales)


def arguments(images, tokens, dim, queries, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator).to(device, dtype) for shape in [(images, tokens, dim), (queries, dim)]
    )


def int8_arguments(*sizes, **options):
    x, q = arguments(*sizes, **options)
    return (40 * x).clamp(-127, 127).to(torch.int8), q


def scales_of(x):
    """One for each token, in float16 as a store has them; some are 0."""
    images, tokens = torch.arange(len(x))[:, None], torch.arange(x.shape[1])[None]
    return (((2 * images + 3 * tokens) % 7) / 100).half().to(x.device)


def mask_of(x, absent=(1,)):
    """Some tokens of each image, none of those in `absent`."""
    images, tokens = torch.arange(len(x))[:, None], torch.arange(x.shape[1])[None]
    mask = (2 * images + tokens) % 3 != 0
    mask[[image for image in absent if image < len(x)]] = False
    return mask.to(x.device)


def masked(function, absent=(1,)):
    return lambda x, q: function(x, q, mask_of(x, absent))


def scaled(function):
    return lambda x, q: function(x, q, mask_of(x), scales_of(x))


class TestMultiQueryPool(OperatorContract):
    name = "multi_query_pool"
    definition = staticmethod(multi_query_pool_definition)
    module = Pool
    tolerance = TOLERANCE
    arguments = staticmethod(arguments)

    def samples(self, dtype, device):
        def case(*sizes):
            return self.arguments(*sizes, dtype=dtype, device=device)

        x, q = case(3, 8, 6, 4)
        return [
            case(2, 7, 5, 3),
            case(3, 11, 9, 4),
            case(1, 1, 1, 1),
            case(5, 1, 8, 2),
            case(2, 13, 4, 17),  # more queries than tokens and channels
            (x[:, 1:], q),  # without the [CLS] token
            (x.transpose(1, 2)[:, :4].contiguous().transpose(1, 2), q[:, :4]),  # a flattened feature map
            (x[:1].expand(4, -1, -1), q[::2]),
            (x[..., ::2], q.t().contiguous().t()[:, ::2]),
        ]

    def interpreter_samples(self, dtype):
        # Beyond a tile of queries, tokens and channels too.
        return [self.arguments(2, 67, 70, 33, dtype=dtype), *self.samples(dtype, "cpu")]

    def check_kernels(self):
        for form in (self, TestMasked(), TestInt8()):
            OperatorContract.check_kernels(form)


class TestMasked(TestMultiQueryPool):
    """The same operator with a mask that its inputs' shapes give; not a second contract for what takes no function."""

    __test__ = False
    operator = staticmethod(masked(operator))
    definition = staticmethod(masked(multi_query_pool_definition))


class TestInt8(TestMasked):
    """Masked tokens of int8."""

    operator = staticmethod(scaled(operator))
    definition = staticmethod(scaled(multi_query_pool_definition))
    arguments = staticmethod(int8_arguments)


@pytest.mark.parametrize("test", [TestMasked(), TestInt8()], ids=["masked", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_other_forms(dtype, test):
    with poisoned_memory():
        test.check_values(test.samples(dtype, "cpu"), TOLERANCE[dtype])
    test.test_counts_the_flops_of_its_definition()
    test.test_fake_and_meta_agree_with_real("cpu")


def looped(x, q, mask):
    """The equations, one number after the other."""
    B, N, D = x.shape
    z, attention = x.new_zeros(B, len(q), D), x.new_zeros(B, len(q), N)
    for b in range(B):
        taking_part = [n for n in range(N) if mask[b, n]]
        for m in range(len(q)):
            logits = {n: sum(q[m, c] * x[b, n, c] for c in range(D)) / D**0.5 for n in taking_part}
            total = sum(logit.exp() for logit in logits.values())
            for n, logit in logits.items():
                attention[b, m, n] = logit.exp() / total
                z[b, m] = z[b, m] + attention[b, m, n].clone() * x[b, n]
    return z, attention


@pytest.mark.parametrize("function", [operator, multi_query_pool_definition], ids=["operator", "definition"])
@pytest.mark.parametrize("absent", [(), (1,)], ids=["some", "one-image-none"])
def test_equals_the_loops(function, absent):
    args = arguments(3, 6, 4, 3)
    torch.testing.assert_close(
        differentiate(masked(function, absent), args), differentiate(masked(looped, absent), args), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("absent", [(), (0, 1)], ids=["some", "all-none"])
def test_masked_gradcheck(absent):
    args = [tensor.requires_grad_() for tensor in arguments(2, 5, 3, 2)]
    assert torch.autograd.gradcheck(masked(operator, absent), args)


def whole_arguments(draw, *sizes):
    x, q = draw(*sizes, dtype=torch.float32)
    return x, q, mask_of(x), None if draw is arguments else scales_of(x)


@pytest.mark.parametrize("draw", [arguments, int8_arguments], ids=["float", "int8"])
def test_other_forms_opcheck_compile_and_script(draw):
    x, q, mask, scales = whole_arguments(draw, 2, 7, 5, 3)
    for tokens in (x, *([x.clone().requires_grad_()] if scales is None else [])):
        torch.library.opcheck(operator.default, (tokens, q.requires_grad_(), mask, scales))

    def results(function, marks):
        return differentiate(lambda q: function(x, q, marks, scales), (q,))

    traced = torch.fx.symbolic_trace(WholePool())
    for way in (torch.compile(WholePool(), fullgraph=True), traced, torch.jit.script(WholePool())):
        for marks in (mask, None):
            torch.testing.assert_close(results(way, marks), results(operator, marks))


@pytest.mark.parametrize("draw", [arguments, int8_arguments], ids=["float", "int8"])
def test_other_forms_export_with_open_sizes(draw):
    def inputs(*sizes):
        return whole_arguments(draw, *sizes)

    sizes = tuple(
        None if tensor is None else dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO)
        for tensor in inputs(2, 7, 5, 3)
    )
    program = torch.export.export(WholePool(), inputs(2, 7, 5, 3), dynamic_shapes=sizes)
    program = program.run_decompositions(decompositions())
    assert not any("visionattn" in str(node.target) for node in program.graph.nodes)
    for args in (inputs(2, 7, 5, 3), inputs(3, 4, 6, 9)):
        torch.testing.assert_close(program.module()(*args), multi_query_pool_definition(*args))


@pytest.mark.parametrize("function", [operator, multi_query_pool_definition], ids=["operator", "definition"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_image_without_tokens_gives_zeros(function, dtype):
    x, q = arguments(3, 5, 4, 2, dtype=dtype)
    outputs, gradients = differentiate(masked(function, absent=(1,)), (x, q))
    assert not any(tensor[1].any() for tensor in (*outputs, gradients[0]))
    assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
    (_, _), (grad_x, grad_q) = differentiate(masked(function, absent=(0, 1, 2)), (x, q))
    assert not grad_x.any()
    assert not grad_q.any()


def test_masked_tokens_are_as_absent_ones():
    x, q = arguments(2, 9, 5, 3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    z, attention = operator(x, q, mask)
    shorter_z, shorter_attention = operator(x[:, :6], q)
    torch.testing.assert_close(z, shorter_z)
    torch.testing.assert_close(attention[..., :6], shorter_attention)
    assert not attention[..., 6:].any()
    torch.testing.assert_close(operator(x, q, torch.ones_like(mask)), operator(x, q), rtol=0, atol=0)


def test_int8_tokens_are_as_their_floats():
    x, q = int8_arguments(3, 9, 5, 4)
    scales, mask = scales_of(x), mask_of(x)
    found = differentiate(lambda q: operator(x, q, mask, scales), (q,))
    expected = differentiate(lambda q: operator(scales.double()[..., None] * x, q, mask), (q,))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_scales(dtype):
    x, q = int8_arguments(3, 9, 5, 4, dtype=torch.float32)
    scales = 0.01 + torch.arange(27).view(3, 9) / 7e4  # that half precisions do not hold
    with torch.autocast("cpu", dtype=dtype):
        outputs, (gradient,) = differentiate(lambda q: operator(x, q, None, scales), (q,))
    expected, (expected_gradient,) = differentiate(lambda q: operator(x, q, None, scales), (q.to(dtype),))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_huge_logits(dtype):
    """Logits of 1e5 and more, beyond float16: the largest takes all, and its token is the output."""
    x, q = arguments(2, 6, 4, 3)
    x, q = (400 * x).to(dtype), (400 * q).to(dtype)
    exact = q.double() @ x.double().transpose(1, 2) / 2
    assert exact.abs().max() > 1e5
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    assert (first - second).min() > 100
    (z, attention), gradients = differentiate(operator, (x, q))
    winner = exact.argmax(-1)
    assert torch.equal(attention, nn.functional.one_hot(winner, 6).to(dtype))
    assert torch.equal(z, x.gather(1, winner[..., None].expand(-1, -1, 4)))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("test", [TestMultiQueryPool(), TestMasked()], ids=["all", "masked"])
def test_both_forms_of_bfloat16(test, native, monkeypatch):
    """Whatever the processor, that with products of bfloat16 and that with chunks of float32 hold, gradients too."""
    monkeypatch.setattr(plain, "multiplies_bfloat16", lambda x: native and x.dtype == torch.bfloat16)
    with poisoned_memory():
        test.check_values(test.samples(torch.bfloat16, "cpu"), TOLERANCE[torch.bfloat16])


def test_the_form_depends_on_dtype_and_processor(monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert multiplies_bfloat16(torch.zeros(1, dtype=torch.bfloat16)) == supported
        assert not multiplies_bfloat16(torch.zeros(1, dtype=torch.float16))
        assert not multiplies_bfloat16(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_what_all_tokens_share_costs_gradients_no_digits_in_bfloat16(monkeypatch):
    """Rounded with the rest, ten times as large a part as what differs would leave a digit of the slopes."""
    monkeypatch.setattr(plain, "multiplies_bfloat16", lambda x: x.dtype == torch.bfloat16)
    x, q = arguments(4, 50, 64, 8)
    x, q = (x + 10 * arguments(1, 1, 64, 1, seed=1)[0]).bfloat16(), q.bfloat16()

    def errors(function):
        found, expected = (
            differentiate(lambda x, q: function(x, q)[0], args)[1] for args in ((x, q), (x.double(), q.double()))
        )
        return [((ours - exact).abs().max() / exact.abs().max()).item() for ours, exact in zip(found, expected)]

    ours, plain_errors = errors(operator), errors(multi_query_pool_definition)
    assert ours[0] < 0.02
    assert ours[1] < 0.1
    assert plain_errors[1] > 3 * ours[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_round_no_logits(dtype):
    """A rounded logit of 50 is off by up to 1/8 in bfloat16, and its share by as much of itself."""
    x, q = arguments(4, 50, 64, 8, dtype=dtype)
    q = 16 * q
    exact = multi_query_pool_definition(x.double(), q.double())[1]

    def error(function):
        return (function(x, q)[1].double() - exact).abs().max().item()

    unit = torch.finfo(dtype).eps
    assert error(operator) <= unit / 2
    assert error(multi_query_pool_definition) > 5 * error(operator)


def test_adding_the_same_to_all_logits_changes_nothing():
    x, q = arguments(2, 7, 5, 3)
    x[..., 0] = 1
    raised = q.clone()
    raised[:, 0] += 1000
    torch.testing.assert_close(operator(x, raised), operator(x, q), rtol=1e-11, atol=1e-11)


def test_equals_scaled_dot_product_attention():
    x, q = arguments(3, 19, 24, 5)
    z, attention = operator(x, q)
    torch.testing.assert_close(z, nn.functional.scaled_dot_product_attention(q.expand(3, 5, 24), x, x))
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_stacked_heads_are_as_single_ones():
    x, q = arguments(3, 10, 6, 12)
    stacked = differentiate(operator, (x, q))[0]
    for head in range(4):
        rows = slice(3 * head, 3 * head + 3)
        for found, expected in zip((part[:, rows] for part in stacked), operator(x, q[rows]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("test", [TestMasked(), TestInt8()], ids=["masked", "int8"])
@pytest.mark.parametrize("chunk", [1, 60, 130])
def test_several_chunks_are_as_one(chunk, test, monkeypatch):
    args = test.arguments(5, 7, 4, 3)
    whole = differentiate(test.operator, args)
    monkeypatch.setattr(plain, "_CHUNK_ON_CPU", chunk)
    torch.testing.assert_close(differentiate(test.operator, args), whole)


@pytest.mark.parametrize(("tokens", "dim"), [(49, 1280), (17, 1536), (5, 4096), (3, 257)])
def test_wide_tokens(tokens, dim):
    args = arguments(3, tokens, dim, 8, dtype=torch.float32)
    doubles = [tensor.double() for tensor in args]
    for found, expected in zip(differentiate(operator, args), differentiate(multi_query_pool_definition, doubles)):
        for ours, exact in zip(found, expected):
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * max(1, exact.abs().max().item()))


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(0, 4),
    tokens=st.integers(0, 9),
    dim=st.integers(1, 8),
    queries=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_any_sizes(images, tokens, dim, queries, seed):
    args = arguments(images, tokens, dim, queries, seed=seed)
    mask = torch.rand(images, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = differentiate(lambda x, q: operator(x, q, mask), args)
    expected = differentiate(lambda x, q: multi_query_pool_definition(x, q, mask), args)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation returned in memory of its own."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_nothing_of_the_size_of_the_tokens_is_made(dtype, monkeypatch):
    """Beside the attention and the output there are chunks alone, and float32 tokens are not even copied to those."""
    int8 = dtype == torch.int8
    x, q = int8_arguments(16, 40, 64, 4, dtype=torch.float32) if int8 else arguments(16, 40, 64, 4, dtype=dtype)
    scales = scales_of(x) if int8 else None
    monkeypatch.setattr(plain, "_CHUNK_ON_CPU", 2 * 40 * 64)
    grad = torch.ones(16, 4, 64, dtype=q.dtype)
    with Largest(x, q, grad) as largest:
        z, attention = plain.forward(x, q, None, scales)
        grad_x, _ = plain.backward(grad, None, x, q, scales, attention, needs_x=False)
    outputs = max(z.numel(), attention.numel())
    as_they_are = dtype == torch.float32 or multiplies_bfloat16(x)
    assert largest.numbers == (outputs if as_they_are else max(outputs, 2 * 40 * 64))
    assert largest.numbers < x.numel() / 5
    assert grad_x.numel() == 0
    if not int8:
        with Largest(x, q, grad) as largest:
            plain.backward(grad, None, x, q, None, attention, needs_x=True)
        assert largest.numbers == x.numel()


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_tokens_cost_no_gradient(frozen):
    def products(function):
        x, q = arguments(2, 7, 5, 3)
        x.requires_grad_(not frozen)
        q.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            function(x, q)[0].sum().backward()
        assert (x.grad is None) == frozen
        return counter.get_total_flops() / (2 * x.numel() * len(q))

    assert products(operator) == products(multi_query_pool_definition) == (4 if frozen else 6)


def test_gradients_without_the_ones_of_x_are_the_same():
    x, q = (tensor.requires_grad_() for tensor in arguments(3, 7, 5, 4))
    both = torch.autograd.grad(operator(x, q)[0].square().sum(), (x, q))[1]
    (alone,) = torch.autograd.grad(operator(x.detach(), q)[0].square().sum(), q)
    assert torch.equal(alone, both)


def test_gradients_by_the_attention_alone():
    args = arguments(2, 7, 5, 3)
    found = differentiate(lambda x, q: operator(x, q)[1], args)
    torch.testing.assert_close(found, differentiate(lambda x, q: multi_query_pool_definition(x, q)[1], args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 5)}, r"x: \(7, 5\)"),
        ({"q": torch.zeros(1, 3, 5)}, r"q: \(1, 3, 5\)"),
        ({"q": torch.zeros(3, 4)}, r"x: \(2, 7, 5\), q: \(3, 4\)"),
        ({"q": torch.zeros(3, 5, dtype=torch.bfloat16)}, "q: torch.bfloat16"),
        ({"mask": torch.ones(2, 7)}, "torch.float32 on cpu"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"shape \(2, 7\).* got \(2, 6\)"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool, device="meta")}, "torch.bool on meta"),
        ({"scales": torch.ones(2, 7)}, "got x: torch.float32 with scales"),
        ({"x": INT8}, "got x: torch.int8 without scales"),
        ({"x": INT8, "scales": torch.ones(2, 6)}, r"shape \(2, 7\).* got \(2, 6\)"),
        ({"x": INT8, "scales": torch.ones(2, 7, dtype=torch.int8)}, "torch.int8 on cpu"),
        ({"x": INT8, "scales": torch.ones(2, 7, device="meta")}, "torch.float32 on meta"),
        ({"x": INT8.to("meta"), "scales": torch.ones(2, 7, device="meta")}, "x on meta"),
        ({"x": INT8, "scales": torch.ones(2, 7), "q": torch.zeros(3, 5, dtype=torch.int8)}, "q: torch.int8"),
        ({"x": INT8, "scales": torch.ones(2, 7, requires_grad=True)}, "detach them"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_what_was_given(change, message):
    x, q = arguments(2, 7, 5, 3, dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        operator(**{"x": x, "q": q, "mask": None} | change)
