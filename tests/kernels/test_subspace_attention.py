"""Subspace attention: the operator contract, a loop-written definition, ties in the pool, what the arguments mean."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.contract import OperatorContract, count_flops
from tests.kernels.tensors import differentiate
from visionattn.errors import InputError
from visionattn.kernels._plain import subspace_attention as plain
from visionattn.kernels.subspace_attention import subspace_attention_definition

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
operator = torch.ops.visionattn.subspace_attention


class Attend(nn.Module):
    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        point: Tensor,
        weight: Tensor | None,
        offset: Tensor | None,
        gain: Tensor | None,
        rectify: bool,
        scaled: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.visionattn.subspace_attention(
            x, scale, shift, point, weight, offset, gain, rectify, scaled, eps
        )


def arguments(images, g, width, height, length, form="all", dtype=torch.float64, device="cpu", seed=0):
    """Random arguments of a form: the paper's, the module's with fixed or the batch's statistics, or all there is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    channels = g * width
    x, scale, point = draw(images, channels, height, length), draw(channels), draw(g, width)
    if form == "paper":
        return x, scale, None, point, None, None, None, False, False, 0.0
    shift, weight, offset, gain = draw(channels), draw(g), draw(g), draw(g)
    if form == "fixed":
        return x, scale, shift, point, None, offset, None, True, False, 0.0
    if form == "batch":
        return x, scale, shift, point, weight, offset, None, True, False, 1e-5
    return x, scale, shift, point, weight, offset, gain, True, True, 1e-5


class TestSubspaceAttention(OperatorContract):
    name = "subspace_attention"
    definition = staticmethod(subspace_attention_definition)
    module = Attend
    tolerance = TOLERANCE

    def samples(self, dtype, device):
        def case(*sizes, form="all"):
            return arguments(*sizes, form=form, dtype=dtype, device=device)

        x, *others = case(3, 2, 4, 6, 5, form="fixed")
        return [
            case(2, 3, 4, 6, 5),
            case(3, 2, 5, 4, 7),
            *(case(2, 2, 3, 5, 4, form=form) for form in ("paper", "fixed", "batch")),
            case(2, 1, 5, 1, 6, form="paper"),
            case(3, 5, 1, 4, 1, form="batch"),
            case(2, 2, 2, 1, 1, form="fixed"),
            (x.to(memory_format=torch.channels_last), *others),
            (x.transpose(2, 3).contiguous().transpose(2, 3), *others),
            (x[..., ::2], *others),
            (x[:1].expand(4, -1, -1, -1), *others),
        ]

    def interpreter_samples(self, dtype):
        # The time is that of the programs, one for each subspace of each image.
        def case(*sizes, form="all"):
            return arguments(*sizes, form=form, dtype=dtype)

        x, *others = case(1, 2, 2, 5, 6, form="fixed")
        return [
            case(1, 1, 3, 5, 4, form="paper"),
            case(2, 2, 3, 5, 4),
            case(2, 1, 5, 3, 7, form="batch"),
            case(1, 1, 5, 1, 6, form="paper"),
            case(2, 3, 1, 4, 1, form="batch"),
            case(2, 1, 2, 1, 1, form="fixed"),
            (x.to(memory_format=torch.channels_last), *others),
            (x.transpose(2, 3).contiguous().transpose(2, 3), *others),
            (x[..., ::2], *others),
            (x.expand(2, -1, -1, -1), *others),
            case(1, 1, 1, 17, 16, form="batch"),  # more positions than a tile holds
        ]

    def test_counts_the_flops_of_its_definition(self):
        # Forward alone: PyTorch counts the gradient by a grouped convolution's weight as that of a full one.
        for args in self.samples(torch.float32, "cpu"):
            counts = []
            for function in (self.operator, self.definition):
                with FlopCounterMode(display=False) as counter:
                    function(*args)
                counts.append(counter.get_total_flops())
            assert counts == [4 * args[0].numel()] * 2  # the paper's 2 C H W multiply-accumulates an image
            assert count_flops(self.operator, args) == 3 * counts[0]


def by_loops(x, scale, shift, point, weight, offset, gain, rectify, scaled, eps):
    """The equations, number by number."""
    (B, _, H, W), (g, G) = x.shape, point.shape
    x, logits, out = x.tolist(), torch.zeros(B, g, H, W, dtype=x.dtype), torch.zeros(x.shape, dtype=x.dtype)
    places = list(itertools.product(range(H), range(W)))

    def rho(value):
        return max(value, 0.0) if rectify else value

    for b, n, (y, z) in itertools.product(range(B), range(g), places):
        for i in range(G):
            c = n * G + i
            near = [(u, v) for u, v in places if abs(u - y) <= 1 and abs(v - z) <= 1]
            t = max(rho(scale[c].item() * x[b][c][u][v] + (0 if shift is None else shift[c].item())) for u, v in near)
            logits[b, n, y, z] += point[n, i] * t
    for n in range(g):
        s = logits[:, n].clone()
        if weight is not None:
            mean = s.mean()
            s = weight[n] * (s - mean) / ((s - mean).square().mean() + eps).sqrt()
        s += 0 if offset is None else offset[n]
        for b in range(B):
            powers = [math.exp(rho(s[b, y, z].item())) for y, z in places]
            factor = (H * W if scaled else 1) * (1 if gain is None else gain[n].item())
            for (y, z), power in zip(places, powers):
                for c in range(n * G, (n + 1) * G):
                    out[b, c, y, z] = x[b][c][y][z] * (1 + factor * power / sum(powers))
    return out, logits


@pytest.mark.parametrize("form", ["paper", "fixed", "batch", "all"])
def test_equals_loops(form):
    args = arguments(2, 3, 2, 4, 5, form)
    for found, expected in zip(operator(*args), by_loops(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(1, 7)] * 2),
    form=st.sampled_from(["paper", "fixed", "batch", "all"]),
    seed=st.integers(0, 999),
)
def test_ties_go_to_the_first_as_in_max_pool2d(sizes, form, seed):
    """Whole numbers from -1 to 1 tie in nearly every window."""
    x, *others = arguments(*sizes, form, seed=seed)
    args = (x.round().clamp(-1, 1), *others)
    for found, expected in zip(differentiate(operator, args), differentiate(subspace_attention_definition, args)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["paper", "all"])
@pytest.mark.parametrize("wanted", [1, 50, 10_000])
def test_chunks_change_nothing(form, wanted, monkeypatch):
    args = arguments(5, 3, 2, 4, 5, form)
    expected = differentiate(operator, args)
    monkeypatch.setattr(plain, "_CHUNK_ON_CPU", wanted)
    torch.testing.assert_close(differentiate(operator, args), expected, rtol=0, atol=1e-13)


def test_gate_is_one_plus_a_softmax():
    """Each subspace has one map, above 1, whose excess sums to 1: the mean gain is 1 + 1 / (H W)."""
    x, *others = arguments(2, 3, 4, 6, 5, "paper")
    y, _ = operator(x, *others)
    gate = (y / x).unflatten(1, (3, 4))
    assert (gate > 1).all()
    torch.testing.assert_close(gate, gate[:, :, :1].expand_as(gate))
    torch.testing.assert_close((gate[:, :, 0] - 1).sum((2, 3)), torch.ones(2, 3, dtype=x.dtype))
    scaled, _ = operator(x, *others[:-2], True, 0.0)
    torch.testing.assert_close(scaled - x, 30 * (y - x))


def test_nothing_outside_the_map_takes_part():
    """With zeros around it, a map of negative numbers would have its largest value outside."""
    x, *others = arguments(1, 1, 1, 3, 3, "paper")
    _, logits = operator(-1 - x.abs(), others[0].abs(), *others[1:])
    assert torch.equal(logits < 0, (others[2] > 0).expand_as(logits))


def test_statistics_are_those_of_batch_norm():
    args = arguments(4, 3, 2, 5, 6, "batch")
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    norm.load_state_dict(norm.state_dict() | {"weight": args[4], "bias": args[5]})
    y, logits = operator(*args)
    A = norm(logits).relu().flatten(2).softmax(-1).view_as(logits)
    torch.testing.assert_close(y, args[0] * (1 + A.repeat_interleave(2, 1)))


def test_keeps_channels_last():
    x, *others = arguments(2, 2, 3, 4, 5)
    y, _ = operator(x.to(memory_format=torch.channels_last), *others)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("place", "shape", "text"),
    [
        (0, (2, 6, 4), r"x: \(2, 6, 4\)"),
        (0, (2, 6, 0, 4), "at least one pixel"),
        (1, (5,), r"scale and shift \(C,\)"),
        (3, (4, 2), r"point \(g, G\) with g G = C"),
        (5, (2,), r"offset: \(2,\)"),
    ],
)
def test_wrong_shapes_are_named(place, shape, text):
    args = list(arguments(2, 3, 2, 5, 4))
    args[place] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(InputError, match=text):
        operator(*args)
