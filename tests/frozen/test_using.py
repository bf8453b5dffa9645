"""A frozen model under a policy: in eager mode, compiled, and exported through the checked exporter."""

import pytest
import timm
import torch

from tests.frozen.toys import images, vit
from visionattn.cost import count_macs
from visionattn.errors import InputError
from visionattn.frozen import UnderPolicy, export, observing, using
from visionattn.frozen.plan import make_plan
from visionattn.frozen.policies import POLICIES, Mass, Pooled, Reuse, Strided, TailOnly, Tree, Window

TILES = {"query_tile": 4, "key_tile": 2}


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "tail_only"])
@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_the_whole_budget_is_the_dense_model(name, grid):
    model, x = vit(grid), images(2, grid)
    with torch.no_grad():
        dense = model(x)
        with using(model, POLICIES[name](1.0, **TILES)) as reached:
            found = model(x)
    assert (found - dense).abs().max() < 1e-6 * dense.abs().max()
    assert reached.layers == ([] if name == "reuse" else [f"blocks.{n}.attn" for n in range(3)])


def test_where_attention_is_diffuse_the_tail_helps():
    model, x = vit((8, 8), sharp=0.5), images(2, (8, 8))
    with torch.no_grad():
        dense, errors = model.forward_features(x), {}
        for tail in (False, True):
            with using(model, Mass(0.5, tail, **TILES)):
                errors[tail] = (model.forward_features(x) - dense).norm() / dense.norm()
    assert errors[True] < 0.7 * errors[False]


def test_a_function_is_a_policy():
    model, x, seen = vit((8, 8)), images(2, (8, 8)), []

    def all_tiles(q, k, grid, layer, state):
        seen.append((q.shape, k.shape, grid, layer))
        return torch.arange(4).view(1, 1, 1, 4)

    with torch.no_grad():
        dense = model(x)
        with using(model, all_tiles, "blocks.1.*"):
            torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
    assert seen == [((2, 2, 64, 8), (2, 2, 64, 8), (8, 8), 1)]
    with pytest.raises(InputError, match=r"got int64 \(4,\)"), torch.no_grad():
        with using(model, lambda *args: torch.zeros(4, dtype=torch.int64)):
            model(x)
    with pytest.raises(InputError, match="policy must be a policy, a plan or the path of a plan; got 3"):
        with using(model, 3):
            pass


def test_plans_and_their_files(tmp_path):
    model, x = vit(depth=4), images()
    plan = make_plan(model, x, "planned", budget=0.5, **TILES)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad():
        found = []
        for policy in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json"), plan.make()):
            with using(model, policy):
                found.append(model(x))
    assert all(torch.equal(part, found[0]) for part in found)
    with pytest.raises(InputError, match="plan belongs to another model"), using(vit(depth=2), plan):
        pass
    with pytest.raises(InputError, match="plan belongs to another model"):
        export(vit(depth=2), tmp_path / "model.onnx", tmp_path / "plan.json")


def test_a_bias_and_gradients_are_refused():
    model = timm.create_model("beit_base_patch16_224", img_size=64, depth=2, num_classes=0).eval()
    with pytest.raises(InputError, match="but it adds a bias to its logits"), torch.no_grad():
        with using(model, Window()):
            model(torch.randn(1, 3, 64, 64))
    with pytest.raises(InputError, match="requires gradients"), using(vit(), Window()):
        vit_of = vit()
        with using(vit_of, Window()):
            vit_of(images())


@pytest.mark.slow
def test_compiled():
    model, x = vit(depth=2), images()
    policy = Reuse(0.5, **TILES, sources=[0, 0], select="tree")
    with torch.no_grad(), using(model, policy):
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), eager, rtol=1e-5, atol=1e-5)


def test_cost_is_what_is_executed():
    model = vit((8, 8), depth=1)
    dense = count_macs(model, (3, 32, 32))
    sparse = count_macs(UnderPolicy(model, Window(0.5, **TILES)), (3, 32, 32))
    keys = 4 * 4 + 16 + 1  # near, far, the class token
    assert dense - sparse == 2 * (64 * 65 - 64 * keys) * 16
    assert UnderPolicy(model, Window()).num_classes == 5


def test_exported_through_the_check(tmp_path):
    (file,) = export(vit((7, 6), depth=1), tmp_path / "model.onnx", Pooled(0.5, **TILES))
    assert file.spec.input_size == [3, 28, 24]
    assert file.spec.dynamic_axes == ["batch"]
    assert len(file.rows) == 2
    assert all(row.passed for row in file.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_exports(name, tmp_path):
    model, x = vit((7, 6)), images(2, (7, 6))
    policy = make_plan(model, x, name, budget=0.5, **TILES)
    (file,) = export(model, tmp_path / "model.onnx", policy)
    assert all(row.passed for row in file.rows)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Strided(0.5, **TILES), Tree(0.5, **TILES, pooled=True), Pooled(0.5, **TILES)])
def test_compiled_by_inductor(policy):
    model, x = vit(depth=2), images()
    with torch.no_grad(), using(model, policy):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"]
)
def test_other_families(name):
    patch = 16 if "16" in name else 14
    model = timm.create_model(name, img_size=6 * patch, depth=2, num_classes=0).eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # branches start near zero
            torch.nn.init.ones_(parameter)
    x = torch.randn(1, 3, 6 * patch, 6 * patch)
    with torch.no_grad():
        dense = model(x)
        with using(model, Window(1.0)):
            torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
        with using(model, TailOnly()):
            assert (model(x) - dense).abs().max() > 1e-4


@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "global_pool": "avg"}])
def test_an_observer_outside_of_a_policy_sees_no_parts_of_its_layers(prefix):
    model, calls = vit((8, 8), **prefix), []
    with torch.no_grad(), observing(model, calls.append) as outer, using(model, Window(0.5, **TILES)):
        model(images(1, (8, 8)))
    assert (calls, outer.layers) == ([], [])


def test_a_policy_that_returns_something_else_is_refused():
    model = vit((8, 8))
    with pytest.raises(InputError, match=r"A policy must return indices of key tiles, .* got 3"), torch.no_grad():
        with using(model, lambda *args: 3):
            model(images(1, (8, 8)))


def test_nan_weights_give_no_plan():
    model = vit((8, 8))
    torch.nn.init.constant_(model.blocks[1].attn.qkv.weight, torch.nan)
    with pytest.raises(InputError, match=r"blocks\.1\.attn contains NaN"):
        make_plan(model, images(1, (8, 8)), **TILES)
