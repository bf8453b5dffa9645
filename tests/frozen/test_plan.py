"""Plans: overlaps, paths, budgets of heads, and files."""

import itertools
import json

import pytest
import torch

from tests.frozen.toys import golden, images, vit
from visionattn.errors import DataError, InputError
from visionattn.frozen.plan import (
    Plan,
    head_budgets,
    layer_masses,
    make_plan,
    overlap_matrix,
    plan_reuse,
    refresh_layers,
    tiles_for_mass,
)
from visionattn.frozen.tiles import tile_mass

TILES = {"query_tile": 4, "key_tile": 2}


def values(overlap, path):
    return [overlap[reader if source < 0 else source, reader].item() for reader, source in enumerate(path)]


@pytest.mark.parametrize("changes", [3, 4, 5, 6])
def test_path_equals_rals(changes):
    case = golden("hylra_rals")
    overlap = torch.from_numpy(case["overlap"])
    path = plan_reuse(overlap, changes)
    assert path == case[f"config_{changes}"].tolist()
    found = values(overlap, path)
    assert [min(found), sum(found)] == pytest.approx(case[f"min_sum_{changes}"].tolist(), abs=1e-12)


@pytest.mark.parametrize("changes", [0, 1, 3])
def test_path_equals_brute_force(changes):
    count = 7
    overlap = torch.rand(count, count, dtype=torch.float64).triu().fill_diagonal_(1)
    best = (-1.0, -1.0)
    for refreshed in itertools.product([False, True], repeat=count - 1):
        if sum(refreshed) > changes:
            continue
        sources = [max([0, *(j for j in range(1, reader + 1) if refreshed[j - 1])]) for reader in range(count)]
        found = values(overlap, sources)
        best = max(best, (min(found), sum(found)))
    path = plan_reuse(overlap, changes)
    assert sum(source < 0 for source in path) <= changes + 1
    assert (min(values(overlap, path)), sum(values(overlap, path))) == pytest.approx(best)


def test_sensitive_layers_stay_dense_and_are_no_source():
    path = plan_reuse(torch.ones(6, 6, dtype=torch.float64), 0, sensitive=[0, 3])
    assert path == [-1, -1, 1, -1, 1, 1]
    assert plan_reuse(torch.ones(2, 2), 0, sensitive=[0, 1]) == [-1, -1]
    with pytest.raises(InputError, match="changes must be at least 0; got -1"):
        plan_reuse(torch.ones(2, 2), -1)


def test_overlap_is_of_the_worst_head():
    first = torch.tensor([[[[4.0, 3, 2, 1]], [[4.0, 3, 2, 1]]]])  # (1 image, 2 heads, 1 query tile, 4)
    second = torch.tensor([[[[4.0, 3, 2, 1]], [[4.0, 1, 2, 3]]]])
    assert overlap_matrix([first, second], 2).tolist() == [[1, 0.5], [0, 1]]


def test_tiles_for_mass_and_head_budgets():
    even, sharp = torch.full((10,), 0.1), torch.tensor([0.91, *[0.01] * 9])
    mass = torch.stack([even, sharp])[None, :, None]  # (1, 2 heads, 1, 10)
    assert tiles_for_mass(mass, 0.85).tolist() == [9, 1]
    assert head_budgets([mass], 5) == [[9, 1]]
    assert head_budgets([mass], 1) == [[1, 1]]
    assert head_budgets([mass], 10) == [[10, 10]]


def test_refresh_layers_are_where_masses_change():
    one, other = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    masses = [part[None, None, None] for part in (one, one, other, other, (one + other) / 2)]
    assert refresh_layers(masses, 1) == [0]
    assert refresh_layers(masses, 2) == [0, 2]
    assert refresh_layers(masses, 3) == [0, 2, 4]


def test_masses_are_those_of_the_model():
    model, x, calls = vit(), images(3), []
    model.blocks[1].attn.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    masses = layer_masses(model, [x[:2], x[2:]], **TILES)
    assert masses.names == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert (masses.numbers, masses.grid) == ([0, 1, 2], (6, 6))
    tokens = torch.cat(calls)
    q, k, _ = model.blocks[1].attn.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = tile_mass(q * 8**-0.5, k, (6, 6), 4, 2, prefix=1)
    torch.testing.assert_close(masses.by_layer[1], expected)


def test_plans_are_made_saved_and_read(tmp_path):
    model, x = vit(depth=5), images()
    kinds = ("planned", "reuse", "reuse_tree", "heads", "window", "tree_pooled")
    plans = {name: make_plan(model, x, name, budget=0.4, **TILES) for name in kinds}
    for name, plan in plans.items():
        plan.save(tmp_path / name)
        assert Plan.load(tmp_path / name) == plan
        plan.check(model)
        plan.check(vit(depth=5).to(torch.bfloat16))
        assert plan.make().budget == 0.4
    assert all(source <= layer for layer, source in enumerate(plans["planned"].settings["sources"]))
    assert len(set(plans["reuse"].settings["sources"])) == 4
    assert plans["reuse_tree"].settings["select"] == "tree"
    assert plans["tree_pooled"].make().pooled
    counts = plans["heads"].settings["counts"]
    assert [len(own) for own in counts] == [2] * 5
    assert sum(map(sum, counts)) <= 10 * plans["window"].make().keep((6, 6))


def test_numbers_of_layers_are_those_of_the_model():
    plan = make_plan(vit(depth=4), images(), "planned", layers="blocks.[23].attn", **TILES)
    assert list(plan.layers) == ["blocks.2.attn", "blocks.3.attn"]
    assert plan.settings["sources"][:3] == [0, 1, 2]
    assert plan.settings["sources"][3] in (2, 3)
    heads = make_plan(vit(depth=4), images(), "heads", layers="blocks.2.attn", **TILES)
    assert heads.settings["counts"][:2] == [[], []]


def test_plans_of_other_models_are_refused():
    plan = make_plan(vit(), images(), "window", **TILES)
    with pytest.raises(
        InputError, match=r"plan belongs to another model: VisionTransformer has no layer 'blocks.2.attn'"
    ):
        plan.check(vit(depth=2))
    with pytest.raises(InputError, match=r"plan belongs to another model: the weights of blocks.0.attn"):
        plan.check(vit(sharp=7))
    with pytest.raises(InputError, match=r"plan belongs to another model: the weights of blocks.0.attn"):
        plan.check(vit(qk_norm=True))


def test_files_that_are_no_plans(tmp_path):
    plan = make_plan(vit(), images(), "window", **TILES)
    path = tmp_path / "plan.json"
    plan.save(path)
    content = json.loads(path.read_text())
    damages = {
        "the entry policy is missing": lambda c: c.pop("policy"),
        "is a plan of format 2; 1 is required": lambda c: c.update(visionattn_plan=2),
        "[Pp]olicy 'none' cannot be made": lambda c: c.update(policy="none"),
        "in \\(0, 1\\]; got 2": lambda c: c["settings"].update(budget=2),
        "unexpected keyword": lambda c: c["settings"].update(speed=2),
        "layers.blocks.0.attn. is not a dictionary": lambda c: c["layers"].update({"blocks.0.attn": 3}),
    }
    for message, damage in damages.items():
        broken = json.loads(json.dumps(content))
        damage(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message):
            Plan.load(path)
    with pytest.raises(DataError, match="Could not read"):
        Plan.load(tmp_path / "absent.json")


def test_what_cannot_be_planned():
    with pytest.raises(InputError, match=r"must be one of strided, .*; got 'best'"):
        make_plan(vit(), images(), "best")
    with pytest.raises(InputError, match=r"budget must be in \(0, 1\]; got 0"):
        make_plan(vit(), images(), "window", budget=0)
    other = images(2, (4, 6))
    with pytest.raises(InputError, match=r"one grid of tokens; VisionTransformer has 4 x 6, 6 x 6"):
        make_plan(vit(dynamic_img_size=True), [images(), other])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(3, 24, 24), "at least one image"),
        (torch.zeros(0, 3, 24, 24), "at least one image"),
        ([], "at least one image"),
        (None, "at least one image"),
        (torch.zeros(1, 3, 8, 8), "does not run on images of 3 x 8 x 8"),
        (torch.zeros(1, 1, 24, 24), "does not run on images of 1 x 24 x 24"),
    ],
)
def test_images_that_do_not_fit_are_named(given, words):
    with pytest.raises(InputError, match=words):
        make_plan(vit(), given)


def test_a_plan_names_layers(tmp_path):
    plan = Plan("window", {}, {})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(DataError, match="is damaged: it names no layer"):
        Plan.load(tmp_path / "plan.json")
