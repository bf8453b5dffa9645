"""Match attention: the operator contract, its equations pixel by pixel, softmaxes and memory; positions elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.contract import OperatorContract, poisoned_memory
from tests.kernels.tensors import differentiate, doubled, require_grad
from visionattn.errors import InputError
from visionattn.kernels import decompositions
from visionattn.kernels._plain import match_attention as plain
from visionattn.kernels.match_attention import (
    SIMILARITIES,
    bilinear_softmax,
    match_attention_definition,
    match_attention_exported,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
operator = torch.ops.visionattn.match_attention
BOTH = pytest.mark.parametrize("function", [operator, match_attention_definition], ids=["operator", "definition"])


class Attend(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, field: Tensor, radius: int, similarity: str
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.visionattn.match_attention(q, k, v, field, radius, similarity)


def arguments(
    images=2,
    size=(6, 7),
    heads=2,
    dim=4,
    dim_v=None,
    radius=1,
    similarity="l1",
    shared=False,
    reach=2.0,
    dtype=torch.float64,
    device="cpu",
    seed=0,
):
    """Random arguments of the operator. Centres keep away from integers and from the bounds where they are clamped.

    Keys of half precisions are shifted by less than their step, so that none equals a query in any number: there the
    gradient of a distance jumps, and rounding decides.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    H, W = size
    q, k = draw(images, H, W, heads, dim), draw(images, H, W, heads, dim)
    v = draw(images, H, W, heads, dim_v or dim)
    field = draw(images, H, W, 1 if shared else heads, 2).mul(reach).mul(8).floor().div(8).add(1 / 16)
    q, k = q.mul(8).round().div(8), k.mul(8).round().div(8).add(1 / 16)
    return (*(x.to(device, dtype) for x in (q, k, v, field)), radius, similarity)


class TestMatchAttention(OperatorContract):
    name = "match_attention"
    definition = staticmethod(match_attention_definition)
    module = Attend
    tolerance = TOLERANCE

    def samples(self, dtype, device):
        def case(**options):
            return arguments(dtype=dtype, device=device, **options)

        q, k, v, field, *rest = case(size=(5, 8), heads=3)
        both = torch.cat([k, v], dim=4)
        return [
            case(),
            case(images=3, size=(5, 9), heads=4, dim=5, dim_v=3),
            case(shared=True, heads=4, dim=8),
            case(similarity="dot", dim_v=6),
            case(radius=2, size=(7, 9), dim=5),
            case(radius=3, size=(8, 9), heads=1, images=1),
            case(size=(4, 4), heads=1, dim=1),
            case(radius=2, size=(6, 8), similarity="dot", shared=True, reach=40.0),
            (q, k, v, field.round(), *rest),  # centres on pixels, and on the bounds
            (q, *both.split(4, dim=4), field, *rest),
            (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, field.expand(2, 5, 8, 3, 2), *rest),
            (*(x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in (q, k, v, field)), *rest),
        ]

    def interpreter_samples(self, dtype):
        # The time is that of the backward kernel over keys: as many steps as the longest list of queries has entries.
        def case(*size, **options):
            return arguments(1, size, dtype=dtype, **options)

        q, k, v, field, *rest = case(5, 6, heads=1)
        return [
            case(4, 5, dim=5, dim_v=3),
            case(4, 4, shared=True),
            case(4, 5, heads=1, similarity="dot", dim_v=6),
            case(6, 7, radius=2, heads=1, reach=10.0),
            (q, k, v, field.round(), *rest),
            (*(x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in case(4, 4)[:4]), *rest),
        ]

    def check_kernels(self):
        super().check_kernels()
        self.check_kernels_over_queries()

    def check_kernels_over_queries(self):
        """At radius 3, whose lists are long in a small map. The kernel over keys has no branch for the radius."""
        from visionattn.kernels._triton import match_attention as kernels

        args = arguments(1, (8, 8), 1, radius=3, dtype=torch.float32)
        exact = require_grad(doubled(args))
        expected = match_attention_definition(*exact)
        grads = [torch.randn(out.shape) for out in expected]
        expected = (*expected, *torch.autograd.grad(expected, (exact[0], exact[3]), [grad.double() for grad in grads]))
        found = kernels.backward_q(*grads, *args)
        for ours, exact in zip((*kernels.forward(*args), found.dq, found.dfield), expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * max(1, exact.abs().max().item()))


def looped(q, k, v, field, radius, similarity):
    """The equations, one pixel and head after the other."""
    B, H, W, heads, D = q.shape
    side = 2 * radius + 2
    out = [[[[None] * heads for _ in range(W)] for _ in range(H)] for _ in range(B)]
    attention = [[[[None] * heads for _ in range(W)] for _ in range(H)] for _ in range(B)]
    for b in range(B):
        for y in range(H):
            for x in range(W):
                for head in range(heads):
                    rho = field[b, y, x, head % field.shape[3]]
                    centre_x = (x + rho[0]).clamp(radius, W - 1 - radius - 1e-3)
                    centre_y = (y + rho[1]).clamp(radius, H - 1 - radius - 1e-3)
                    nx, ny = int(centre_x.detach().floor()), int(centre_y.detach().floor())
                    u, w = centre_x - nx, centre_y - ny
                    scores, values = {}, {}
                    for dy in range(-radius, radius + 2):
                        for dx in range(-radius, radius + 2):
                            key = k[b, ny + dy, nx + dx, head]
                            query = q[b, y, x, head]
                            score = (query * key).sum() if similarity == "dot" else -(query - key).abs().sum()
                            scores[dx, dy] = score / D**0.5
                            values[dx, dy] = v[b, ny + dy, nx + dx, head]
                    shares = {place: torch.zeros((), dtype=q.dtype) for place in scores}
                    for right, down, weight in [
                        (0, 0, (1 - u) * (1 - w)),
                        (1, 0, u * (1 - w)),
                        (0, 1, (1 - u) * w),
                        (1, 1, u * w),
                    ]:
                        window = [
                            (dx + right, dy + down)
                            for dx in range(-radius, radius + 1)
                            for dy in range(-radius, radius + 1)
                        ]
                        softmax = torch.stack([scores[place] for place in window]).softmax(0)
                        for place, share in zip(window, softmax):
                            shares[place] = shares[place] + weight * share
                    rows = [shares[dx - radius, dy - radius] for dy in range(side) for dx in range(side)]
                    attention[b][y][x][head] = torch.stack(rows)
                    out[b][y][x][head] = sum(shares[place] * values[place] for place in shares)

    def stacked(nested):
        return torch.stack([stacked(item) for item in nested]) if isinstance(nested, list) else nested

    return stacked(out), stacked(attention)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"similarity": "dot", "dim_v": 3},
        {"shared": True, "size": (4, 9), "reach": 6.0},
        {"radius": 2, "size": (7, 6), "heads": 1, "dim": 8},
        {"radius": 3, "size": (8, 9), "heads": 1, "dim": 2},
    ],
    ids=str,
)
def test_equals_the_loops(form):
    args = arguments(images=1, **form)
    expected = differentiate(looped, args)
    for function in (operator, match_attention_definition):
        torch.testing.assert_close(differentiate(function, args), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form", [{}, {"similarity": "dot"}, {"shared": True}, {"radius": 2, "heads": 1, "size": (6, 6)}], ids=str
)
def test_gradcheck_of_every_input(form):
    args = arguments(**{"images": 1, "size": (4, 5), "dim": 2} | form)
    leaves = [x.requires_grad_() for x in args[:4]]
    assert torch.autograd.gradcheck(lambda *x: operator(*x, *args[4:]), leaves)


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(0, 3),
    size=st.tuples(st.integers(4, 10), st.integers(4, 10)),
    heads=st.sampled_from([1, 4]),
    dim=st.sampled_from([1, 5, 8, 40]),
    shared=st.booleans(),
    similarity=st.sampled_from(SIMILARITIES),
    reach=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_sizes(images, size, heads, dim, shared, similarity, reach, seed):
    args = arguments(images, size, heads, dim, shared=shared, similarity=similarity, reach=reach, seed=seed)
    expected = differentiate(match_attention_definition, args)
    torch.testing.assert_close(differentiate(operator, args), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", [5, 8, 40])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_widths_and_radii_of_the_models(radius, dim):
    args = arguments(1, (9, 11), 4, dim, radius=radius, dtype=torch.float32)
    TestMatchAttention().check_values([args], TOLERANCE[torch.float32])


def test_several_chunks_are_as_one(monkeypatch):
    args = arguments(size=(6, 8), dim_v=6)
    whole = differentiate(operator, args)
    for wanted in (1, 16 * 6 * 7, 16 * 6 * 50):  # one query; some; some of the next image too
        monkeypatch.setattr(plain, "_CHUNK_ON_CPU", wanted)
        torch.testing.assert_close(differentiate(operator, args), whole, rtol=1e-13, atol=1e-13)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_attention_sums_to_one(function, dtype):
    args = arguments(2, (7, 9), 4, 5, radius=2, reach=8.0, dtype=dtype)
    q, k, v, *rest = args
    out, attention = function(q, k, torch.ones_like(v), *rest)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    torch.testing.assert_close(out, torch.ones_like(out))


@BOTH
@pytest.mark.parametrize("column", [0, 3], ids=["first", "last"])
def test_a_key_far_above_the_rest_in_one_sub_window(function, column):
    """Its score is 1000 above: with one maximum for all sub-windows, those without it would have no weight at all."""
    q = torch.zeros(1, 4, 4, 1, 1)
    k = torch.full((1, 4, 4, 1, 1), 1000.0)
    k[0, column, column] = 0  # a corner of the extended window, which a single sub-window holds
    k[0, 1, 2] = 999.0
    v = torch.arange(16.0).view(1, 4, 4, 1, 1)
    field = torch.full((1, 4, 4, 1, 2), 0.0)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    field[0, ..., 0, 0], field[0, ..., 0, 1] = 1.25 - x, 1.5 - y
    args = (q, k, v, field, 1, "l1")
    exact, exact_gradients = differentiate(looped, [x.double() if isinstance(x, Tensor) else x for x in args])
    found, gradients = differentiate(function, args)
    for ours, expected in zip((*found, *gradients), (*exact, *exact_gradients), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    assert found[1][0, 1, 1, 0].max() < 0.5  # the rest have most


@pytest.mark.parametrize(("above", "exact"), [(0.0, True), (60.0, True), (1000.0, False)])
def test_the_exported_form_by_one_softmax(above, exact):
    """A sub-window without any key near the highest one keeps its share of the attention."""
    q = torch.rand(2, 5, 6, 1, 8)
    k = q + 0.1 * torch.randn_like(q) - above / 8**0.5 * (torch.rand(2, 5, 6, 1, 1) < 0.8)
    v, field = torch.randn(2, 5, 6, 1, 3), 2 * torch.randn(2, 5, 6, 1, 2)
    for similarity in SIMILARITIES:
        out, attention = match_attention_exported(q, k, v, field, 1, similarity)
        expected = match_attention_definition(q, k, v, field, 1, similarity)
        assert out.isfinite().all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5, 6, 1))
        assert attention.min() >= 0
        if exact:
            torch.testing.assert_close((out, attention), expected, rtol=1e-4, atol=1e-6)


def test_gradients_by_one_result_alone():
    q, k, v, field, *rest = args = arguments()
    found = differentiate(lambda *x: operator(*x)[0], args)
    torch.testing.assert_close(found, differentiate(lambda *x: match_attention_definition(*x)[0], args))

    def attention(function):
        return lambda q, k, field: function(q, k, v, field, *rest)[1]

    found, expected = (differentiate(attention(f), (q, k, field)) for f in (operator, match_attention_definition))
    torch.testing.assert_close(found, expected)


def test_ties_give_no_gradient_as_in_autograd():
    q, k, v, field, *rest = arguments()
    k = q.clone()
    found, expected = (differentiate(f, (q, k, v, field, *rest)) for f in (operator, match_attention_definition))
    torch.testing.assert_close(found, expected)


def test_the_same_call_gives_the_same_bits():
    args = arguments(1, (8, 40), 4, 8, reach=30.0, dtype=torch.float32)
    for first, second in zip(*(differentiate(operator, args) for _ in "12"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bilinear_softmax_between_integers():
    scores = torch.randn(3, 16, dtype=torch.float64)
    corners = {
        (u, v): bilinear_softmax(scores, torch.tensor([u, v]).double().expand(3, 2)) for u in (0, 1) for v in (0, 1)
    }
    found = bilinear_softmax(scores, torch.tensor([0.25, 0.5]).double().expand(3, 2))
    torch.testing.assert_close(
        found, (3 * corners[0, 0] + corners[1, 0] + 3 * corners[0, 1] + corners[1, 1]) / 8, rtol=1e-13, atol=1e-13
    )


class Largest(TorchDispatchMode):
    """The most bytes in the memory of a tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_nothing_of_the_size_of_the_gathered_keys_is_made(monkeypatch):
    """The largest tensor is the attention, which is a result; the gathered keys would be D times as large."""
    args = arguments(2, (16, 16), 4, 40, dtype=torch.float32)
    k = args[1]
    monkeypatch.setattr(plain, "_CHUNK_ON_CPU", 2**14)
    cotangents = torch.ones_like(k), torch.ones(2, 16, 16, 4, 16)
    with Largest() as largest:
        plain.Matched(*args).forward()
        plain.Matched(*args).backward(*cotangents)
    assert largest.bytes == k.numel() * 4
    with Largest() as textbook:
        match_attention_definition(*args)
    assert textbook.bytes == 16 * k.numel() * 4


def test_onnx_runtime_at_other_sizes(tmp_path):
    """The definition as a graph whose batch, height and width stay open."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

    class Scored(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ops.visionattn.match_attention(q, k, v, field, 1, "l1")

    def inputs(*size, seed=0):
        return arguments(*size, heads=2, dim=8, reach=5.0, dtype=torch.float32, seed=seed)[:4]

    sizes = ({axis: torch.export.Dim.DYNAMIC for axis in range(3)},) * 4
    program = torch.export.export(Scored(), inputs(2, (6, 7)), dynamic_shapes=sizes)
    program = program.run_decompositions(decompositions())
    graph = torch.onnx.export(program, dynamo=True, opset_version=20, optimize=False, verbose=False)
    assert "ReduceL1" not in {node.op_type for node in graph.model.graph}  # MNN computes something else
    graph.save(tmp_path / "it.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(tmp_path / "it.onnx", options)
    for seed, size in enumerate([(2, (6, 7)), (1, (4, 11)), (3, (9, 4))]):
        args = inputs(*size, seed=seed)
        feed = {known.name: x.numpy() for known, x in zip(session.get_inputs(), args, strict=True)}
        for found, expected in zip(session.run(None, feed), operator(*args, 1, "l1"), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_poisoned_memory_at_other_radii():
    test = TestMatchAttention()
    with poisoned_memory():
        test.check_values([arguments(radius=3, size=(9, 8), heads=4, dim=5, dtype=torch.float32)], 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0}, "radius of at least 1"),
        ({"radius": 3}, "window, 8 x 8 pixels; got radius 3"),
        ({"similarity": "cosine"}, "'l1', 'dot'"),
        ({"q": torch.zeros(2, 42, 2, 4)}, r"q: \(2, 42, 2, 4\)"),
        ({"k": torch.zeros(2, 6, 7, 2, 5)}, r"k: \(2, 6, 7, 2, 5\)"),
        ({"v": torch.zeros(2, 6, 8, 2, 4)}, r"v: \(2, 6, 8, 2, 4\)"),
        ({"k": torch.zeros(2, 6, 7, 2, 4, dtype=torch.float16)}, "k: torch.float16"),
        ({"field": torch.zeros(2, 6, 7, 3, 2)}, r"field: \(2, 6, 7, 3, 2\)"),
        ({"field": torch.zeros(2, 6, 7, 2, 3)}, r"field: \(2, 6, 7, 2, 3\)"),
        ({"field": torch.zeros(2, 6, 7, 2, 2, dtype=torch.int64)}, r"torch.int64 on cpu"),
        ({"field": torch.zeros(2, 6, 7, 2, 2, device="meta")}, r"torch.float32 on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_what_was_given(change, message):
    names = ("q", "k", "v", "field", "radius", "similarity")
    with pytest.raises(InputError, match=message):
        operator(**(dict(zip(names, arguments(dtype=torch.float32))) | change))
