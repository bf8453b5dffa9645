"""Generated pairs: the truth is what the surfaces say, both views agree, and a sample follows from its key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from visionattn.data.matching.pairs import MatchPair, crop, flip, matches_inside, resize, seen_by_order
from visionattn.data.matching.scenes import GeneratedPairs, Scene, draw_scene, photograph_views, render
from visionattn.data.matching.surfaces import FIRST, SECOND, SHAPES, Shape, Surface, look
from visionattn.data.matching.textures import KINDS, level, lookup, procedural
from visionattn.data.samplers import SampleKey
from visionattn.errors import ConfigError, DataError

SIZE = (64, 112)
SEEDS = range(6)


@pytest.fixture(scope="module", params=[False, True], ids=["stereo", "flow"])
def scenes(request):
    """Scenes with what is rendered of them."""
    found = []
    for seed in SEEDS:
        scene = draw_scene(np.random.default_rng(seed), SIZE, 40.0, flow=request.param)
        # A reflection has no match where its surface has one.
        scene = Scene(scene.surfaces, [replace(one, glint=0.0) for one in scene.looks])
        found.append((scene, *render(scene, SIZE)))
    return found


def grid():
    return [axis.astype(float) for axis in np.mgrid[: SIZE[0], : SIZE[1]]]


def warped(image, field, mode):
    """An image (H, W, C) of the other view brought to this one."""
    y, x = grid()
    places = np.stack([2 * (x + field[..., 0]) / (SIZE[1] - 1) - 1, 2 * (y + field[..., 1]) / (SIZE[0] - 1) - 1], -1)
    channels = torch.from_numpy(image).double().permute(2, 0, 1)[None]
    found = F.grid_sample(channels, torch.from_numpy(places)[None], mode, padding_mode="border", align_corners=True)
    return found[0].permute(1, 2, 0).numpy()


def away_from_outlines(top, other_top, field):
    """Pixels whose 3 x 3 neighbours show one surface, here and at the match."""
    height, width = top.shape
    same = np.ones_like(top, bool)
    y, x = grid()
    mx, my = np.rint(x + field[..., 0]).astype(int), np.rint(y + field[..., 1]).astype(int)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            same &= np.roll(top, (dy, dx), (0, 1)) == top
            same &= other_top[(my + dy).clip(0, height - 1), (mx + dx).clip(0, width - 1)] == top
    same[:2], same[-2:], same[:, :2], same[:, -2:] = False, False, False, False
    return same & (mx >= 2) & (mx < width - 2) & (my >= 2) & (my < height - 2)


def tops(scene):
    y, x = grid()
    return [look(scene.surfaces, x.ravel(), y.ravel(), s).top.reshape(SIZE) for s in (FIRST, SECOND)]


def test_warping_by_the_truth_gives_the_other_view(scenes):
    errors, wrong, shares = [], [], []
    for scene, views, fields, seen in scenes:
        labels = tops(scene)
        for view in (0, 1):
            inner = seen[view] & away_from_outlines(labels[view], labels[1 - view], fields[view])
            back = warped(views[1 - view], fields[view], "bicubic")
            if not inner.any():
                continue
            errors.append(np.abs(back - views[view])[inner].mean())
            wrong.append(np.abs(warped(views[1 - view], fields[view] + [1, 0], "bicubic") - views[view])[inner].mean())
            shares.append(inner.mean())
    assert np.mean(shares) > 0.2
    assert np.mean(errors) < 0.01  # of a range of 1
    assert np.mean(wrong) > 4 * np.mean(errors)


def test_both_views_agree_where_both_see(scenes):
    count = 0
    for scene, _, fields, _ in scenes:
        y, x = (axis.ravel() for axis in grid())
        for view, s in enumerate((FIRST, SECOND)):
            field = fields[view].reshape(-1, 2)
            top = look(scene.surfaces, x, y, s).top
            mx, my = x + field[:, 0], y + field[:, 1]
            # Not the map of the other view, but its surfaces, at the match itself.
            for number in np.unique(top):
                at = top == number
                surface = scene.surfaces[number]
                a, b = surface.points(mx[at], my[at], -s)
                back = surface.field(a, b, -s)
                assert np.abs(back + field[at]).max() < 1e-3
                count += at.sum()
    assert count == 2 * len(scenes) * SIZE[0] * SIZE[1]


def test_left_and_right_maps_agree(scenes):
    compared = 0
    for scene, _, fields, seen in scenes:
        labels = tops(scene)
        for view in (0, 1):
            inner = seen[view] & away_from_outlines(labels[view], labels[1 - view], fields[view])
            # Between pixels the map of a plane is exact, and that of a curved surface nearly so.
            back = warped(fields[1 - view], fields[view], "bilinear")
            difference = np.abs(back + fields[view]).max(-1)[inner]
            compared += inner.sum()
            if difference.size:
                assert np.median(difference) < 1e-4
                assert difference.max() < 0.01
    assert compared > 10000


def test_what_the_other_view_sees_is_what_the_truth_implies(scenes):
    shares = []
    for scene, _, fields, seen in scenes:
        labels = tops(scene)
        for view in (0, 1):
            field, other = fields[view], fields[1 - view]
            inside = matches_inside(field)
            assert not seen[view][~inside].any()
            y, x = grid()
            mx, my = x + field[..., 0], y + field[..., 1]
            corners = []
            for rows in (np.floor(my), np.ceil(my)):
                for columns in (np.floor(mx), np.ceil(mx)):
                    at = rows.astype(int).clip(0, SIZE[0] - 1), columns.astype(int).clip(0, SIZE[1] - 1)
                    corners.append((labels[1 - view][at] == labels[view], np.abs(other[at] + field).max(-1)))
            all_same = np.logical_and.reduce([same for same, _ in corners])
            all_far = np.logical_and.reduce([distance > 3 for _, distance in corners])
            near = np.logical_and.reduce([distance < 3 for _, distance in corners])
            # Where all four pixels around the match show another place it is hidden, where they show this one it is
            # not; an outline of less than a pixel between them is all that may say otherwise.
            for mask, expected in ((all_same, True), (all_far, False), (all_same & near, True)):
                if (inside & mask).any():
                    shares.append((seen[view][inside & mask] == expected).mean())
    shares = np.array(shares)
    assert len(shares) > 20
    assert shares.min() > 0.98
    assert shares.mean() > 0.998


def test_the_nearest_surface_is_seen():
    wall = Surface(np.array([20.0, 10.0]), (0, 0, 0, 0, 0, 2.0))
    near = Surface(np.array([20.0, 10.0]), (0, 0, 0, 0, 0, 9.0), Shape("box", (6.0, 4.0)))
    far = Surface(np.array([20.0, 10.0]), (0, 0, 0, 0, 0, 1.0), Shape("box", (6.0, 4.0)))
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[:20, :40])
    for order in ([wall, near, far], [wall, far, near], [near, far, wall]):
        for s in (FIRST, SECOND):
            found = look(order, x, y, s)
            box = (np.abs(x - 20 - s * 9) <= 6) & (np.abs(y - 10) <= 4)
            assert np.array_equal(found.top == order.index(near), box)
            assert not (found.top == order.index(far)).any()
            # At the outline, half of the pixel is the wall's.
            edge = box & (np.abs(y - 10) == 4) & (np.abs(x - 20 - s * 9) < 5)
            assert np.all(found.second[edge] == order.index(wall))
            assert found.weight[edge] == pytest.approx(0.5)


@pytest.mark.parametrize("s", [FIRST, SECOND])
def test_points_and_their_places_are_inverse(s):
    rng = np.random.default_rng(0)
    for _ in range(20):
        quadric = (*rng.uniform(-2e-3, 2e-3, 3), *rng.uniform(-0.3, 0.3, 2), rng.uniform(0, 50))
        turn = rng.uniform(0, 6)
        linear, shift = rng.uniform(-0.2, 0.2, (2, 2)), tuple(rng.uniform(-9, 9, 2))
        surface = Surface(rng.uniform(0, 50, 2), quadric, None, (np.cos(turn), np.sin(turn)), linear, shift)
        a, b = rng.uniform(-40, 40, (2, 100))
        # The equations of the module, step by step.
        w = np.stack([(a + s * surface.m(a, b)), b]).T @ np.array([surface.direction, (-np.sin(turn), np.cos(turn))])
        p = surface.origin + w + s * (w @ linear.T + shift)
        found = surface.points(p[:, 0], p[:, 1], s)
        np.testing.assert_allclose(found, [a, b], atol=1e-9)
        other = np.stack([(a - s * surface.m(a, b)), b]).T @ np.array(
            [surface.direction, (-np.sin(turn), np.cos(turn))]
        )
        q = surface.origin + other - s * (other @ linear.T + shift)
        np.testing.assert_allclose(surface.field(a, b, s), q - p, atol=1e-9)
        # No pixel that shows the surface is left out.
        shape = Shape("ellipse", (15.0, 8.0), 0.5)
        near = Surface(surface.origin, quadric, shape, surface.direction, linear, shift)
        y, x = (axis.ravel().astype(float) for axis in np.mgrid[-40:90, -60:110])
        a, b = near.points(x, y, s)
        inside = np.flatnonzero(np.isfinite(a) & (shape.distance(np.nan_to_num(a), b) > -0.5))
        assert set(inside) <= set(near.around(x, y, s))


def test_stereo_disparities_are_positive_and_on_rows(scenes):
    for scene, _, fields, _ in scenes:
        if scene.surfaces[0].nearness is None:
            assert (fields[..., 1] == 0).all()
            assert (-fields[0, ..., 0]).min() >= 0
            assert fields[1, ..., 0].min() >= 0
            assert fields[1, ..., 0].max() <= 40
        else:
            assert np.abs(fields[..., 1]).max() > 0.5


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes(kind):
    numbers = {
        "star": ((0.2, 1.0), (0.1, 2.0)),
        "ring": ((4.0,),),
        "fence": ((8.0, 3.0),),
        "leaves": ((0.3, 0.0, 12.0), (2.0, 1.0, 20.0)),
    }
    shape = Shape(kind, (20.0, 12.0), 0.4, numbers.get(kind, ()))
    a, b = np.meshgrid(np.linspace(-40, 40, 801), np.linspace(-40, 40, 801))
    inside = shape.distance(a, b)
    assert 0.01 < (inside > 0).mean() < 0.5
    assert np.hypot(a, b)[inside > 0].max() <= shape.reach
    # Near the outline it is a distance to within a factor.
    slope = np.hypot(*np.gradient(inside, 0.1))[np.abs(inside) < 0.3]
    assert 0.3 < np.median(slope) < 2.5


def test_equal_keys_give_equal_samples():
    pairs = GeneratedPairs(4, SIZE, 30.0, rectification=0.6, seed=3)
    first, again = pairs[SampleKey(1, 2)], pairs[SampleKey(1, 2)]
    assert all(np.array_equal(x, y) for x, y in zip(first, again))
    for other in (
        pairs[SampleKey(2, 2)],
        pairs[SampleKey(1, 3)],
        GeneratedPairs(4, SIZE, 30.0, seed=4)[SampleKey(1, 2)],
    ):
        assert not np.array_equal(first.fields, other.fields)
    assert first.views.shape == (2, *SIZE, 3)
    assert (first.views.dtype, first.fields.dtype, first.seen.dtype) == (np.uint8, np.float32, bool)


def test_the_global_generators_are_left_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    GeneratedPairs(1, SIZE, 30.0)[0]
    assert np.random.random() == expected


def test_photographs_are_textures(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 700, 3), np.uint8)).save(tmp_path / "a.png")
    pairs = GeneratedPairs(3, SIZE, 30.0, [tmp_path])
    plain = GeneratedPairs(3, SIZE, 30.0)
    assert any(not np.array_equal(pairs[i].views, plain[i].views) for i in range(3))
    with pytest.raises(DataError, match="There is no folder"):
        GeneratedPairs(3, SIZE, 30.0, [tmp_path / "none"])
    with pytest.raises(ConfigError, match=r"must be between 1 and the width .112.; got 200"):
        GeneratedPairs(3, SIZE, 200.0)


def test_rectification_moves_rows_only_and_keeps_the_truth():
    plain = GeneratedPairs(6, (96, 160), 30.0, seed=5)
    moved = GeneratedPairs(6, (96, 160), 30.0, rectification=2.0, seed=5)
    shares = []
    for index in range(6):
        one, other = plain[index], moved[index]
        assert np.array_equal(one.fields, other.fields)
        shares.append(np.array_equal(one.views, other.views))
    assert 0 < sum(shares) < 6


def test_textures():
    for number in range(len(KINDS)):
        texture = procedural(number)
        assert texture.shape == (3, 256, 256)
        assert texture.mean().item() == pytest.approx(0, abs=1e-4)
        assert texture.std().item() == pytest.approx(1, abs=1e-3)
    texture = procedural(0)
    u, v = np.array([3.0, 200.0]), np.array([5.0, 255.0])
    np.testing.assert_allclose(lookup(texture, u, v), texture[:, v.astype(int), u.astype(int)], atol=2e-3)
    # Mirrored beyond the sides.
    np.testing.assert_allclose(lookup(texture, -1 - u, v), lookup(texture, u, v), atol=2e-3)
    small, density = level(texture, 4.0)
    assert small.shape == (3, 64, 64)
    assert density == 1.0
    assert level(texture, 1.0)[0] is texture


def test_cameras_differ_only_where_they_are_meant_to():
    views = np.full((2, 8, 8, 3), 0.5, np.float32)
    gaps = [
        np.abs(np.diff(photograph_views(views, np.random.default_rng(i)).mean((1, 2)), axis=0)).max() for i in range(60)
    ]
    assert np.median(gaps) < 10
    assert max(gaps) > 8


def pair_of_planes():
    """A plane of disparity 4 before one of 1, made of numbered pixels."""
    width = 24
    views = np.zeros((2, 6, width, 3), np.uint8)
    fields = np.zeros((2, 6, width, 2), np.float32)
    fields[0, ..., 0], fields[1, ..., 0] = -1, 1
    fields[0, :, 10:14, 0], fields[1, :, 6:10, 0] = -4, 4
    views[0] = np.arange(width)[:, None]
    views[1] = np.arange(width)[:, None] + fields[1, ..., :1]
    seen = np.stack([seen_by_order(fields[0]), seen_by_order(fields[1])])
    return MatchPair(views, fields, seen)


def test_what_hides_what():
    seen = pair_of_planes().seen
    assert np.flatnonzero(~seen[0, 0]).tolist() == [0, 7, 8, 9]  # outside, then behind the nearer plane
    assert np.flatnonzero(~seen[1, 0]).tolist() == [10, 11, 12, 23]
    unknown = np.full((2, 5, 2), np.nan, np.float32)
    assert not seen_by_order(unknown).any()


def assert_true(pair, tolerance=0):
    for view in (0, 1):
        for row, column in np.argwhere(pair.seen[view]):
            x = column + pair.fields[view, row, column, 0]
            assert abs(int(pair.views[1 - view, row, round(x), 0]) - int(pair.views[view, row, column, 0])) <= tolerance


def test_flips_crops_and_scales_keep_the_truth():
    pair = pair_of_planes()
    assert_true(pair)
    mirrored = flip(pair, exchange=True)
    assert_true(mirrored)
    assert (mirrored.fields[0, ..., 0] <= 0).all()  # still a left view
    assert np.array_equal(flip(mirrored, exchange=True).views, pair.views)
    assert_true(flip(pair, exchange=False))
    assert (flip(pair, exchange=False).fields[0, ..., 0] > 0).all()
    cut = crop(pair, 1, 2, 4, 12)
    assert cut.views.shape == (2, 4, 12, 3)
    assert_true(cut)
    assert not cut.seen[0, :, 0].any()  # its match was cut off
    large = resize(pair, 12, 72)
    assert large.views.shape == (2, 12, 72, 3)
    assert set(np.unique(large.fields[0, ..., 0])) == {-12.0, -3.0}
    assert_true(large, tolerance=1)


def test_thin_structures():
    plain, thin = (draw_scene(np.random.default_rng(1), SIZE, 40.0, thin=share) for share in (0.0, 1.0))
    again = draw_scene(np.random.default_rng(1), SIZE, 40.0)
    assert [one.shape for one in plain.surfaces] == [one.shape for one in again.surfaces]
    shapes = [draw_scene(np.random.default_rng(seed), SIZE, 40.0, thin=1.0).surfaces for seed in SEEDS]
    shapes = [one.shape for surfaces in shapes for one in surfaces if one.shape is not None]
    assert {shape.kind for shape in shapes} == {"box", "fence", "leaves"}
    assert all(shape.half[1] <= 2 for shape in shapes if shape.kind == "box")
    bars = [shape.numbers for shape in shapes if shape.kind == "fence"]
    assert {len(numbers) for numbers in bars} == {1, 2}
    assert all(1 <= width <= 4 for numbers in bars for _, width in numbers)
    views, fields, seen = render(thin, SIZE)
    assert np.isfinite(views).all()
    assert np.isfinite(fields).all()
    assert 0.3 < seen.mean() < 1
    with pytest.raises(ConfigError, match="thin must be between 0 and 1; got 2"):
        GeneratedPairs(1, SIZE, 40.0, thin=2)


def test_a_grid_is_two_fences():
    a, b = np.random.default_rng(0).uniform(-30, 30, (2, 500))
    bars = ((8.0, 2.0), (11.0, 3.0))
    grid = Shape("fence", (20, 25), 0.3, bars).distance(a, b)
    cos, sin = np.cos(0.3), np.sin(0.3)
    u, v = cos * a + sin * b, cos * b - sin * a
    on_bar = np.abs(u - 8 * np.rint(u / 8)) <= 1, np.abs(v - 11 * np.rint(v / 11)) <= 1.5
    expected = (np.abs(u) <= 20) & (np.abs(v) <= 25) & (on_bar[0] | on_bar[1])
    assert np.array_equal(grid >= 0, expected)
    assert 0.1 < expected.mean() < 0.5
