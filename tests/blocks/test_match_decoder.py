"""The decoder of MatchStereo and MatchFlow: the contract, its equations in loops, and that views are alike."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import ConvexUpsampling, ConvGLU, CorrelationStart, MatchLayer
from visionattn.blocks.match_decoder import convex_upsample, exchange_views, visible_pixels


class TestConvGLU(BlockContract):
    block = ConvGLU
    cases = [{"dim": 4}, {"dim": 4, "dim_hidden": 3}]
    open_axes = (0, 1, 2)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, size + 2, 4)


class UpsamplingParts(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x[..., :4], x[..., 4:])


class TestConvexUpsampling(BlockContract):
    block = ConvexUpsampling
    cases = [{"dim": 4}, {"dim": 4, "factor": 4, "dim_hidden": 3}]
    open_axes = (0, 1, 2)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, size + 2, 4 + 3)

    def make(self, case, **kwargs):
        return UpsamplingParts(super().make(case, **kwargs)).eval()

    def output_shape(self, case, x):
        factor = case.get("factor", 2)
        return len(x), factor * x.shape[1], factor * x.shape[2], 3


class OnPairs(nn.Module):
    """A block whose batch is left views, then right ones, as one whose channels hold both of a pair."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, batch = x.shape[-1] // 2, x.shape[0]
        y = self.block(torch.cat([x[..., :half], x[..., half:]]))
        return torch.cat([y[:batch], y[batch:]], -1)


class LayerParts(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, field_self, field_cross, positions = self.layer(x[..., :4], 2 * x[..., 4:6], x[..., 6:])
        return torch.cat([x, field_self, field_cross, positions], -1)


class TestMatchLayer(BlockContract):
    block = MatchLayer
    cases = [
        {"dim": 4, "num_heads": 2},
        {"dim": 4, "num_heads": 2, "radius": 2, "flow": True},
    ]
    open_axes = (0, 1, 2)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size + 5, size + 6, 2 * (4 + 2 + 4))

    def make(self, case, **kwargs):
        layer = super().make(case, **kwargs)
        nn.init.constant_(layer.field_scale, 0.7)  # increments are divided by it
        return OnPairs(LayerParts(layer)).eval()

    def output_shape(self, case, x):
        return *x.shape[:3], 2 * (4 + 2 + 2 + 4)


class TestCorrelationStart(BlockContract):
    block = CorrelationStart
    cases = [{"dim": 4}, {"dim": 4, "flow": True}]
    open_axes = (0, 1, 2)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size + 5, size + 6, 2 * 4)

    def make(self, case, **kwargs):
        return OnPairs(super().make(case, **kwargs)).eval()

    def output_shape(self, case, x):
        return *x.shape[:3], 4


def normed(x, weight):
    """LayerNorm without a bias."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def stereo_start(q, k):
    """The equations of the stereo start for one pair, disparity by disparity."""
    H, W, C = q.shape
    fields = torch.zeros(2, H, W, 2, dtype=q.dtype)
    for y in range(H):
        volumes = torch.zeros(2, W, W, dtype=q.dtype)  # view, d, x; a score of 0 where there is no match
        for d in range(W):
            for x in range(d, W):
                volumes[0, d, x] = volumes[1, d, x - d] = q[y, x] @ k[y, x - d] / C**0.5
        p = volumes.softmax(1)
        for d in range(W):
            p[0, d, :d] = p[0, d, d].clone()
            p[1, d, W - 1 - d :] = p[1, d, W - 1 - d].clone()
        for view, sign in ((0, -1), (1, 1)):
            for x in range(W):
                row = p[view, :, x]
                means = [row[max(0, d - 2) : d + 3].sum() / 5 for d in range(W)]
                best = min(max(int(torch.stack(means).argmax()), 2), W - 3)
                taps = {d: row[d] if row[d] >= 1 / W else 0 * row[d] for d in range(best - 2, best + 3)}
                total = sum(taps.values())
                if total > 0:
                    fields[view, y, x, 0] = sign * sum(d * share for d, share in taps.items()) / total
    return fields


def flow_start(q, k):
    """The same of the flow start."""
    H, W, C = q.shape
    fields = torch.zeros(2, H, W, 2, dtype=q.dtype)
    for view, (a, b) in enumerate(((q, k), (k, q))):
        matrix = (a.flatten(0, 1) @ b.flatten(0, 1).T / C**0.5).softmax(-1)
        for y in range(H):
            for x in range(W):
                me = y * W + x
                p = matrix[me].view(H, W)
                means = [matrix[max(0, me - 2) : me + 3, max(0, j - 2) : j + 3].sum() for j in range(H * W)]
                best_y, best_x = divmod(int(torch.stack(means).argmax()), W)
                best_y, best_x = min(max(best_y, 2), H - 3), min(max(best_x, 2), W - 3)
                total, mean = 0.0, torch.zeros(2, dtype=q.dtype)
                for v in range(best_y - 2, best_y + 3):
                    for u in range(best_x - 2, best_x + 3):
                        if p[v, u] >= 1 / (H * W):
                            total = total + p[v, u]
                            mean = mean + p[v, u] * torch.tensor([u, v], dtype=q.dtype)
                fields[view, y, x] = (mean / total if total else mean) - torch.tensor([x, y], dtype=q.dtype)
    return fields


@pytest.mark.parametrize(("flow", "loops"), [(False, stereo_start), (True, flow_start)], ids=["stereo", "flow"])
def test_start_equals_the_loops(flow, loops):
    start = randomise(CorrelationStart(6, flow, dtype=torch.float64))
    nn.init.normal_(start.norm.weight)
    x = 2 * torch.randn(4, 6, 9, 6, dtype=torch.float64)
    tokens = normed(x, start.norm.weight)
    q, k = tokens[:2] @ start.q.weight.T, tokens[2:] @ start.k.weight.T
    expected = torch.stack([loops(*pair) for pair in zip(2 * q, 2 * k)], 1).flatten(0, 1)
    with torch.no_grad():
        start.q.weight.mul_(2)
        start.k.weight.mul_(2)
    torch.testing.assert_close(start(x), expected, rtol=1e-10, atol=1e-10)


def told(start, q, k):
    """The start for given rows of scores' factors: norm and projections left out."""
    start.norm, start.q.weight.data, start.k.weight.data = nn.Identity(), torch.eye(q.shape[-1]), torch.eye(q.shape[-1])
    return start(torch.cat([q, k]))


def test_impossible_disparities_take_part_with_a_score_of_zero():
    """All scores are -60: at pixel x, disparities 0 .. x are possible, and have no share beside the impossible ones.

    Without the fill, those of pixel 2 would be 3 .. 7, with 1 / 5 each. Filled, disparity d has what it has at pixel d:
    nothing, but 1 / 8 for d = 7, since at pixel 7 all are possible.
    """
    W = 8
    q, k = torch.full((1, 1, W, 1), 60.0), torch.full((1, 1, W, 1), -1.0)
    left, right = told(CorrelationStart(1), q, k)
    assert left[0, 2, 0].item() == pytest.approx(-7)
    assert left[0, 7, 0].item() == pytest.approx(-2)  # the mean of the first five, whose shares are just average
    torch.testing.assert_close(right.flip(1), -left)


def test_without_a_share_above_average_the_start_is_zero():
    """As before, but that disparity 7 has less than the others at pixel 7: nothing is left at pixel 2."""
    q, k = torch.full((1, 1, 8, 1), 60.0), torch.full((1, 1, 8, 1), -1.0)
    k[0, 0, 0] = -3.0
    start = CorrelationStart(1)
    left, _ = told(start, q, k)
    assert left[0, 2, 0].item() == 0
    left[0, 2, 0].backward()
    assert all(not p.grad.any() for p in (start.q.weight, start.k.weight))


def test_a_clear_match_is_found():
    """Orthogonal tokens, the right view moved by three pixels."""
    W = 12
    q = 10 * torch.eye(W)[None, None]
    k = q.roll(-3, 2)
    field = told(CorrelationStart(W), q, k)
    torch.testing.assert_close(field[0, 0, 3:, 0], torch.full((W - 3,), -3.0))
    torch.testing.assert_close(field[1, 0, : W - 3, 0], torch.full((W - 3,), 3.0))
    assert not field[..., 1].any()


def test_a_clear_flow_is_found():
    H, W = 6, 7
    q = 10 * torch.eye(H * W).view(1, H, W, H * W)
    k = q.roll((1, -2), (1, 2))
    field = told(CorrelationStart(H * W, flow=True), q, k)
    torch.testing.assert_close(field[0, :-1, 4:-1], torch.tensor([-2.0, 1.0]).expand(H - 1, 2, 2))
    torch.testing.assert_close(field[1, 1:, 2:-3], torch.tensor([2.0, -1.0]).expand(H - 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flow", [False, True], ids=["stereo", "flow"])
def test_start_of_half_precisions_is_float32(flow, dtype):
    start = randomise(CorrelationStart(6, flow)).to(dtype)
    field = start(torch.randn(2, 6, 9, 6).to(dtype))
    assert field.dtype == torch.float32
    assert field.isfinite().all()


def test_consistent_fields_are_visible():
    field = torch.zeros(2, 6, 12, 2)
    field[0, ..., 0], field[1, ..., 0] = -3, 3
    visible = visible_pixels(field)[..., 0]
    # Matches outside the other view find a field of zeros there, 3 pixels off.
    assert visible[0].bool().tolist() == [[x >= 3 for x in range(12)]] * 6
    assert visible[1].bool().tolist() == [[x < 9 for x in range(12)]] * 6
    assert not visible_pixels(field.abs()).any()


def test_visible_pixels_are_those_of_the_definition():
    field = 1.5 * torch.randn(2, 6, 9, 2, dtype=torch.float64)
    expected = torch.zeros(2, 6, 9, 1, dtype=torch.float64)
    for view in range(2):
        for y in range(6):
            for x in range(9):
                at_x, at_y = x + field[view, y, x, 0].item(), y + field[view, y, x, 1].item()
                back = torch.zeros(2, dtype=torch.float64)
                for v in range(6):
                    for u in range(9):
                        back += max(0, 1 - abs(at_x - u)) * max(0, 1 - abs(at_y - v)) * field[1 - view, v, u]
                expected[view, y, x] = (field[view, y, x] + back).abs().sum() < 2
    assert 10 < expected.sum() < 98
    assert torch.equal(visible_pixels(field), expected)


def test_the_mask_has_no_gradient():
    field = torch.randn(2, 6, 9, 2, requires_grad=True)
    assert not visible_pixels(field).requires_grad


@pytest.mark.parametrize("factor", [2, 4])
def test_convex_upsampling_equals_the_loops(factor):
    field, logits = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 4, 9 * factor**2).double()
    expected = torch.zeros(2, 3 * factor, 4 * factor, 2).double()
    for b in range(2):
        for y in range(3 * factor):
            for x in range(4 * factor):
                (row, sub_row), (column, sub_column) = divmod(y, factor), divmod(x, factor)
                mine = logits[b, row, column].view(9, factor, factor)[:, sub_row, sub_column].softmax(0)
                for n in range(9):
                    v, u = row + n // 3 - 1, column + n % 3 - 1
                    if 0 <= v < 3 and 0 <= u < 4:
                        expected[b, y, x] += mine[n] * factor * field[b, v, u]
    torch.testing.assert_close(convex_upsample(field, logits, factor), expected)


def test_the_mask_head_decides_the_weights():
    up = randomise(ConvexUpsampling(4, 2, 5, dtype=torch.float64))
    features, field = torch.randn(1, 3, 5, 4).double(), torch.randn(1, 3, 5, 2).double()
    hidden = F.conv2d(features.permute(0, 3, 1, 2), up.mask[0].weight, up.mask[0].bias, padding=1).relu()
    logits = F.conv2d(hidden, up.mask[2].weight, up.mask[2].bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(up(features, field), convex_upsample(field, logits, 2))


def test_conv_glu_equals_the_equations():
    mlp = randomise(ConvGLU(4, dtype=torch.float64))
    x = torch.randn(2, 3, 5, 4).double()
    a, b = (x @ part.T + bias for part, bias in zip(mlp.fc1.weight.split(8), mlp.fc1.bias.split(8)))
    padded, around = F.pad(a, (0, 0, 1, 1, 1, 1)), torch.zeros_like(a)
    for dy in range(3):
        for dx in range(3):
            around += padded[:, dy : dy + 3, dx : dx + 5] * mlp.dwconv.weight[:, 0, dy, dx]
    around = around + mlp.dwconv.bias
    gelu = around * 0.5 * (1 + torch.erf(around / 2**0.5))
    torch.testing.assert_close(mlp(x), (gelu * b) @ mlp.fc2.weight.T + mlp.fc2.bias)


def layer_and_inputs(flow, dtype=torch.float64):
    layer = randomise(MatchLayer(6, 2, 1, flow, dtype=dtype))
    nn.init.constant_(layer.field_scale, 0.3)
    x, field, positions = (torch.randn(4, 6, 9, channels, dtype=dtype) for channels in (6, 2, 4))
    return layer, (x, layer.on_rows(2 * field), positions)


@pytest.mark.parametrize("flow", [False, True], ids=["stereo", "flow"])
def test_layer_equals_the_equations(flow):
    """As the authors write it: the field, scaled, is a part of the tokens."""
    layer, (x, f, s) = layer_and_inputs(flow)
    keep = torch.tensor([1.0, float(flow)]).double()
    found = layer(x, f, s)
    z = torch.cat([x, layer.field_scale * f, s], -1)
    norm = normed(z, layer.norm0.weight)
    z = z + layer.match_attention_self(norm, s.unflatten(-1, (2, 2)), visible_pixels(f))
    positions = z[..., 8:]
    z = torch.cat([z[..., :6], z[..., 6:8] * keep], -1)
    field_self = z[..., 6:] / layer.field_scale
    norm = normed(z, layer.norm1.weight)
    z = z + layer.match_attention_cross(norm, torch.cat([norm[2:], norm[:2]]), field_self[..., None, :])
    field_cross, x = z[..., 6:] * keep / layer.field_scale, z[..., :6]
    x = x + layer.mlp(normed(x, layer.norm2.weight))
    torch.testing.assert_close(found, (x, field_self, field_cross, positions), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("flow", [False, True], ids=["stereo", "flow"])
def test_swapping_the_views_swaps_the_outputs(flow):
    layer, inputs = layer_and_inputs(flow)
    swapped = layer(*map(exchange_views, inputs))
    torch.testing.assert_close(swapped, tuple(map(exchange_views, layer(*inputs))))


def test_swapping_the_views_swaps_the_start():
    """With one projection for both; in stereo, views that are swapped are mirrored too, or matches would lie behind."""
    x = torch.randn(4, 6, 9, 6, dtype=torch.float64)
    for flow in (False, True):
        start = randomise(CorrelationStart(6, flow, dtype=torch.float64))
        start.k = start.q
        if flow:
            torch.testing.assert_close(start(exchange_views(x)), exchange_views(start(x)))
        else:
            torch.testing.assert_close(start(exchange_views(x).flip(2)), -exchange_views(start(x)).flip(2))


def test_views_and_pairs_do_not_mix():
    """A pair's results are those it has alone, and the right view reaches the left one's by cross attention only."""
    layer, inputs = layer_and_inputs(flow=False)
    alone = layer(*(part[[1, 3]] for part in inputs))
    torch.testing.assert_close(alone, tuple(part[[1, 3]] for part in layer(*inputs)))


def test_stereo_fields_stay_on_their_rows():
    layer, (x, f, s) = layer_and_inputs(flow=False)
    _, field_self, field_cross, positions = layer(x, f, s)
    assert not field_self[..., 1].any()
    assert not field_cross[..., 1].any()
    assert (positions - s)[..., 1::2].abs().min() > 0


def test_gradients_flow_through_layers_and_start():
    start = randomise(CorrelationStart(6))
    layers = [randomise(MatchLayer(6, 2)) for _ in range(2)]
    up = randomise(ConvexUpsampling(6))
    for layer in layers:
        nn.init.constant_(layer.field_scale, 0.3)
    x = torch.randn(2, 6, 12, 6, requires_grad=True)
    field, positions = start(x), torch.zeros(2, 6, 12, 4)
    y = x
    for layer in layers:
        y, _, field, positions = layer(y, field, positions)
    up(y, torch.cat([field, positions], -1)).square().mean().backward()
    assert x.grad.abs().min() > 0
    for module in (start, *layers, up):
        assert [n for n, p in module.named_parameters() if not p.grad.isfinite().all() or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fields_keep_their_precision(dtype):
    """Tokens in half precision, fields in float32, near pixel 700, where float16 has steps of half a pixel."""
    layer, _ = layer_and_inputs(flow=False, dtype=torch.float32)
    with torch.no_grad():
        layer.match_attention_self.proj.weight.zero_()
        layer.match_attention_cross.proj.weight.zero_()
    field = torch.zeros(2, 4, 9, 2)
    field[..., 0] = 700.1
    layer = layer.to(dtype)
    x, after_self, after_cross, _ = layer(torch.randn(2, 4, 9, 6).to(dtype), field, torch.zeros(2, 4, 9, 4))
    assert x.dtype == dtype
    assert torch.equal(after_self, field)
    assert torch.equal(after_cross, field)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_autocast(dtype, tolerance):
    layer, inputs = layer_and_inputs(flow=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(*inputs)
    assert {part.dtype for part in found[1:]} == {torch.float32}
    for part, expected in zip(found, layer(*inputs), strict=True):
        torch.testing.assert_close(part.float(), expected, rtol=0, atol=tolerance)


def test_parameters_are_the_published_ones():
    """Shapes of the tiny model's layer at 1/32, and of its start."""
    layer = MatchLayer(160, 4, 2, device="meta")
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "field_scale": (1, 1, 1, 2),
        "norm0.weight": (170,),
        "match_attention_self.q.weight": (160, 171),
        "match_attention_self.k.weight": (160, 171),
        "match_attention_self.v.weight": (160, 171),
        "match_attention_self.proj.weight": (170, 160),
        "norm1.weight": (162,),
        "match_attention_cross.q.weight": (160, 162),
        "match_attention_cross.k.weight": (160, 162),
        "match_attention_cross.v.weight": (160, 162),
        "match_attention_cross.g.weight": (160, 162),
        "match_attention_cross.proj.weight": (162, 304),
        "norm2.weight": (160,),
        "mlp.fc1.weight": (640, 160),
        "mlp.fc1.bias": (640,),
        "mlp.dwconv.weight": (320, 1, 3, 3),
        "mlp.dwconv.bias": (320,),
        "mlp.fc2.weight": (160, 320),
        "mlp.fc2.bias": (160,),
    }
    assert [tuple(p.shape) for p in CorrelationStart(160, device="meta").parameters()] == [(160,), *[(160, 160)] * 2]
    last = ConvexUpsampling(32, 4, 64, device="meta")
    assert [tuple(p.shape) for p in last.parameters()] == [(64, 32, 3, 3), (64,), (144, 64, 1, 1), (144,)]
