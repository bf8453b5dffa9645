"""MatchAttention, self and cross: the contract, the equations in loops, what positions in the output mean."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import MatchAttention, MatchCrossAttention
from visionattn.blocks.match import bilinear_softmax
from visionattn.errors import InputError


class OnParts(nn.Module):
    """A block of several inputs as one of a single tensor, whose last channels they are."""

    def __init__(self, block, widths):
        super().__init__()
        self.block = block
        self.widths = widths


class SelfParts(OnParts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, field, visible = x.split(self.widths, -1)
        return self.block(tokens, field.unflatten(-1, (-1, 2)), visible)


class CrossParts(OnParts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, other, field = x.split(self.widths, -1)
        return self.block(tokens, other, field.unflatten(-1, (-1, 2)))


class Parts:
    """What the two contracts share: a block that is called with the parts of a tensor."""

    open_axes = (0, 1, 2)
    parts: type[OnParts]
    widths: Callable[[dict], tuple[int, ...]]  # of the parts, in a case

    def make(self, case, **kwargs):
        return self.parts(super().make(case, **kwargs), self.widths(case)).eval()

    def output_shape(self, case, x):
        return *x.shape[:3], case["dim"]


class TestMatchAttention(Parts, BlockContract):
    block = MatchAttention
    parts = SelfParts
    cases = [
        {"dim": 8, "num_heads": 2},
        {"dim": 8, "dim_attn": 6, "num_heads": 2, "radius": 2},
        {"dim": 8, "num_heads": 2, "similarity": "dot"},
    ]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size + 5, size + 6, 8 + 4 + 1)

    def widths(self, case):
        return [8, 4, 1]


class TestMatchCrossAttention(Parts, BlockContract):
    block = MatchCrossAttention
    parts = CrossParts
    cases = [
        {"dim": 6, "num_heads": 2},
        {"dim": 6, "dim_attn": 8, "num_heads": 2, "radius": 2},
        {"dim": 6, "num_heads": 2, "similarity": "dot"},
    ]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size + 5, size + 6, 6 + 6 + 2)

    def widths(self, case):
        return [6, 6, 2]


def attended(q, k, v, field, heads, radius):
    """Output and attention of the centres p + rho, one pixel and head after the other."""
    (B, H, W, _), side = q.shape, 2 * radius + 2
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    out, attention = torch.zeros_like(q), q.new_zeros(B, H, W, heads, side**2)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                for head in range(heads):
                    rho = field[b, y, x, head if field.shape[3] > 1 else 0]
                    cx = min(max(x + rho[0].item(), radius), W - 1 - radius - 1e-3)
                    cy = min(max(y + rho[1].item(), radius), H - 1 - radius - 1e-3)
                    left, top = int(cx) - radius, int(cy) - radius
                    window = (b, slice(top, top + side), slice(left, left + side), head)
                    scores = -(q[b, y, x, head] - k[window]).abs().sum(-1) / q.shape[-1] ** 0.5
                    shares = torch.zeros_like(scores)
                    for down, by_y in ((0, 1 - cy % 1), (1, cy % 1)):
                        for right, by_x in ((0, 1 - cx % 1), (1, cx % 1)):
                            part = (slice(down, down + side - 1), slice(right, right + side - 1))
                            shares[part] += by_y * by_x * scores[part].flatten().softmax(0).view(side - 1, side - 1)
                    attention[b, y, x, head] = shares.flatten()
                    out[b, y, x, head] = (shares[..., None] * v[window]).sum((0, 1))
    return out.flatten(3), attention.flatten(3)


@pytest.mark.parametrize("radius", [1, 2])
def test_self_equals_the_equations(radius):
    block = randomise(MatchAttention(7, 6, 2, radius, dtype=torch.float64))
    x, field = torch.randn(2, 6, 7, 7).double(), 2 * torch.randn(2, 6, 7, 2, 2).double()
    visible = (torch.rand(2, 6, 7, 1) > 0.5).double()
    tokens = torch.cat([x, visible], -1)
    out, _ = attended(*(tokens @ part.weight.T for part in (block.q, block.k, block.v)), field, 2, radius)
    torch.testing.assert_close(block(x, field, visible), out @ block.proj.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [1, 2])
def test_cross_equals_the_equations(radius):
    block = randomise(MatchCrossAttention(7, 6, 2, radius, dtype=torch.float64))
    x, other = torch.randn(2, 2, 6, 7, 7).double()
    field = 2 * torch.randn(2, 6, 7, 1, 2).double()
    q, k, v = x @ block.q.weight.T, other @ block.k.weight.T, other @ block.v.weight.T
    out, attention = attended(q, k, v, field, 2, radius)
    gate = x @ block.g.weight.T
    gated = gate * gate.sigmoid() * out
    expected = torch.cat([gated, attention], -1) @ block.proj.weight.T
    torch.testing.assert_close(block(x, other, field), expected, rtol=1e-12, atol=1e-12)


def test_matching_tokens_take_the_attention():
    """Tokens that differ much between pixels: a field that points at the match sees it in the centre of its windows."""
    block = MatchCrossAttention(4, num_heads=1, dtype=torch.float64)
    with torch.no_grad():
        for part in (block.q, block.k, block.v):
            part.weight.copy_(torch.eye(4))
    x = 400 * torch.randn(1, 6, 12, 4).double()
    field = torch.tensor([2.0, 0.0]).double().expand(1, 6, 12, 1, 2)
    out, attention = block.attend(x, x.roll(2, 2), field)
    inner = (slice(None), slice(1, 4), slice(1, 7))
    torch.testing.assert_close(out[inner], x[inner])
    centre = F.one_hot(torch.tensor(5), 16).double()
    torch.testing.assert_close(attention[inner], centre.expand_as(attention[inner]))


def test_gradients_reach_the_field():
    block = randomise(MatchCrossAttention(4, num_heads=2, dtype=torch.float64))
    x = torch.randn(1, 6, 6, 4).double()
    field = (torch.rand(1, 6, 6, 1, 2).double() + torch.tensor([0.1, 0.1])).div(2).requires_grad_()
    function = lambda field: block(x, x.flip(1), field)  # noqa: E731
    assert torch.autograd.gradcheck(function, field)
    (grad,) = torch.autograd.grad(function(field).square().sum(), field)
    assert grad[:, 1:3, 1:3].abs().min() > 0


def test_bilinear_softmax_is_the_function_of_the_operator():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 3)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    field = torch.stack([1.25 - x, 1.75 - y], -1)[None, :, :, None]
    _, attention = torch.ops.visionattn.match_attention(q, k, v, field, 1, "l1")
    scores = -(q.view(16, 1, 3) - k.view(1, 16, 3)).abs().sum(-1) / 3**0.5  # the extended window is the map
    expected = bilinear_softmax(scores, torch.tensor([0.25, 0.75]).expand(16, 2))
    torch.testing.assert_close(attention.view(16, 16), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    block = randomise(MatchCrossAttention(8, num_heads=2))
    x, other, field = torch.randn(1, 6, 9, 8), torch.randn(1, 6, 9, 8), torch.randn(1, 6, 9, 1, 2)
    with torch.autocast("cpu", dtype=dtype):
        y = block(x, other, field)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), block(x, other, field), rtol=0, atol=5e-2)
    half = block.to(dtype)(x.to(dtype), other.to(dtype), field)
    torch.testing.assert_close(half, y, rtol=0, atol=5e-2)


@pytest.mark.parametrize("block", [MatchAttention, MatchCrossAttention])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads 3"),
        ({"radius": 0}, "radius 0"),
        ({"dim_attn": 0}, "dim_attn 0"),
        ({"similarity": "cosine"}, "'l1', 'dot'"),
    ],
)
def test_refusals_name_the_numbers(block, arguments, message):
    with pytest.raises(InputError, match=message):
        block(8, **arguments)


def test_maps_smaller_than_a_window_are_refused():
    x = torch.randn(1, 5, 9, 8)
    with pytest.raises(InputError, match="window, 6 x 6 pixels"):
        MatchCrossAttention(8, radius=2)(x, x, torch.zeros(1, 5, 9, 1, 2))
