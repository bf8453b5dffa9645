"""Match attention's positions: fields and their gradients, borders, and what half precisions keep of them."""

import pytest
import torch

from tests.kernels.tensors import differentiate
from tests.kernels.test_match_attention import BOTH, arguments, operator
from visionattn.kernels.match_attention import match_attention_definition


@BOTH
def test_gradient_of_the_field_is_the_closed_form(function):
    """rho moves the four weights alone, so that the attention's derivatives are differences of softmaxes."""
    q, k, v, field, radius, similarity = arguments(1, (7, 8), 1, 3)
    field = field.clone().requires_grad_()
    _, attention = function(q, k, v, field, radius, similarity)
    y, x = 3, 4
    rho = torch.tensor([0.3, -0.6], dtype=torch.float64)
    with torch.no_grad():
        field[0, y, x, 0] = rho
        # Integer centres have one sub-window: the softmax over it is the attention.
        nx, ny = x + 0, y - 1
        alpha = {}
        for right in (0, 1):
            for down in (0, 1):
                rows = [(ny + down + dy, nx + right + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                scores = torch.stack([-(q[0, y, x, 0] - k[0, r, c, 0]).abs().sum() / 3**0.5 for r, c in rows])
                grid = torch.zeros(4, 4, dtype=torch.float64)
                grid[down : down + 3, right : right + 3] = scores.softmax(0).view(3, 3)
                alpha[right, down] = grid.flatten()
    _, attention = function(q, k, v, field, radius, similarity)
    u, w = 0.3, 0.4
    by_x = (1 - w) * (alpha[1, 0] - alpha[0, 0]) + w * (alpha[1, 1] - alpha[0, 1])
    by_y = (1 - u) * (alpha[0, 1] - alpha[0, 0]) + u * (alpha[1, 1] - alpha[1, 0])
    cotangent = torch.randn(16, dtype=torch.float64)
    (grad,) = torch.autograd.grad((attention[0, y, x, 0] * cotangent).sum(), field)
    torch.testing.assert_close(grad[0, y, x, 0], torch.stack([by_x @ cotangent, by_y @ cotangent]))
    grad[0, y, x] = 0
    assert not grad.any()


@BOTH
@pytest.mark.parametrize("radius", [1, 2])
def test_integer_centres_are_window_attention(function, radius):
    """Neighbourhood attention with distances as scores, where windows are inside the map."""
    size, side = 2 * radius + 5, 2 * radius + 1
    q, k, v, field, *_ = arguments(2, (size, size), 2, 4, radius=radius)
    out, attention = function(q, k, v, torch.zeros_like(field), radius, "l1")
    inner = slice(radius, size - radius - 1)  # the last row of centres is clamped to a pixel's thousandth less
    windows = k.unfold(1, side, 1).unfold(2, side, 1).flatten(-2)  # (B, H', W', heads, D, side side)
    values = v.unfold(1, side, 1).unfold(2, side, 1).flatten(-2)
    inside = slice(0, inner.stop - radius)
    scores = -(q[:, inner, inner, :, :, None] - windows[:, inside, inside]).abs().sum(-2) / 2
    shares = scores.softmax(-1)
    torch.testing.assert_close(out[:, inner, inner], (shares.unsqueeze(-2) * values[:, inside, inside]).sum(-1))
    found = attention[:, inner, inner].unflatten(-1, (side + 1, side + 1))
    torch.testing.assert_close(found[..., :side, :side].flatten(-2), shares)
    assert not found[..., side, :].any()
    assert not found[..., side].any()


@BOTH
def test_moving_the_field_by_pixels_moves_the_keys(function):
    q, k, v, field, *_ = arguments(1, (6, 12), 2, 4, reach=0.5)
    middle = slice(4, 8)
    moved = function(q, k.roll(2, 2), v.roll(2, 2), field + torch.tensor([2.0, 0.0]), 1, "l1")
    for found, expected in zip(moved, function(q, k, v, field, 1, "l1"), strict=True):
        torch.testing.assert_close(found[:, :, middle], expected[:, :, middle])


@BOTH
def test_borders_clamp_each_axis_and_stop_its_gradient(function):
    q, k, v, field, radius, similarity = arguments(1, (6, 8), 2, 4)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    pixel = torch.stack([x, y], -1)[:, :, None].double()
    for shift, clamped in {(50.0, 0.125): "x", (-50.0, 0.125): "x", (0.125, 50.0): "y", (0.125, -50.0): "y"}.items():
        centre = torch.tensor([3.25, 2.25]).double() + torch.tensor(shift).double()
        moved = (centre - pixel).expand_as(field[0]).unsqueeze(0).clone().requires_grad_()
        (out, attention) = function(q, k, v, moved, radius, similarity)
        held = centre.clamp(torch.tensor([1.0, 1.0]).double(), torch.tensor([8 - 2 - 1e-3, 6 - 2 - 1e-3]).double())
        other = function(q, k, v, (held - pixel).expand_as(field[0]).unsqueeze(0), radius, similarity)
        torch.testing.assert_close((out, attention), other, rtol=1e-11, atol=1e-11)
        (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), moved)
        stopped, free = (0, 1) if clamped == "x" else (1, 0)
        assert not grad[..., stopped].any()
        assert grad[..., free].abs().min() > 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions_know_where_they_are(function, dtype):
    """At pixel 1500 a bfloat16 position would have steps of 8 pixels; those of the windows are exact."""
    q, k, v, field, *rest = arguments(1, (4, 1600), 1, 4, dtype=dtype)
    k = torch.zeros_like(k)
    v = torch.arange(1600.0, dtype=torch.float64).sub(1500).clamp(-64, 64).view(1, 1, 1600, 1, 1).expand(1, 4, -1, 1, 4)
    field = torch.full(field.shape, 3.3125, dtype=torch.float32)  # 3 + 5 / 16
    out, attention = function(torch.zeros_like(q), k, v.to(dtype), field, *rest)
    assert out.dtype == attention.dtype == dtype
    exact = torch.arange(1480, 1520) - 1500 + 3.3125
    torch.testing.assert_close(out[0, 1, 1480:1520, 0, 0].double(), exact.double(), rtol=torch.finfo(dtype).eps, atol=0)
    weights = torch.tensor([11 / 16, 1.0, 1.0, 5 / 16]) / 3
    found = attention[0, 1, 1480:1520, 0].float().unflatten(-1, (4, 4)).sum(-2)
    torch.testing.assert_close(found, weights.expand_as(found), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_the_field(dtype):
    q, k, v, field, *rest = arguments(1, (4, 600), 1, 4, dtype=torch.float32)
    field = (field + 300.123).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found = operator(q, k, v, field, *rest)
    expected = operator(q.to(dtype), k.to(dtype), v.to(dtype), field, *rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(found[0].float().square().sum(), field)
    assert grad.dtype == torch.float32


def test_a_shared_field_is_one_for_each_head():
    q, k, v, field, *rest = arguments(shared=True, heads=3)
    outputs, (*others, grad) = differentiate(operator, (q, k, v, field, *rest))
    wide = differentiate(operator, (q, k, v, field.expand(-1, -1, -1, 3, -1), *rest))
    torch.testing.assert_close(outputs, wide[0], rtol=0, atol=0)
    torch.testing.assert_close((*others, grad), (*wide[1][:3], wide[1][3].sum(3, keepdim=True)))


def test_nan_in_the_field_stays_in_its_pixel():
    q, k, v, field, *rest = arguments(1, (6, 6), 1, 4)
    expected, _ = operator(q, k, v, field, *rest)
    field[0, 2, 3] = float("nan")
    for function in (operator, match_attention_definition):
        out, _ = function(q, k, v, field, *rest)
        assert out[0, 2, 3].isnan().all()
        out[0, 2, 3] = expected[0, 2, 3]
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("dtype", "pixel", "step"),
    [
        (torch.float16, 1000, 0.5),
        (torch.float16, 512, 0.5),
        (torch.float16, 1024, 1),
        (torch.bfloat16, 1000, 4),
        (torch.float32, 1000, 2**-14),
    ],
)
def test_steps_of_half_precisions_are_those_of_the_documentation(dtype, pixel, step):
    """Why fields stay in float32: the distance to the next position that a dtype holds."""
    exponent = torch.tensor(float(pixel)).log2().floor()
    assert (torch.finfo(dtype).eps * 2**exponent).item() == step
    at = torch.tensor(float(pixel), dtype=dtype)
    assert (at + step).item() == pixel + step
    assert at + step / 4 == at
