"""Fewer tokens in later blocks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn
from visionattn.errors import InputError
from visionattn.frozen import observing
from visionattn.frozen.heads import prune_heads
from visionattn.frozen.scores import dither_order, greedy, merge, nearest_kept, sensitivity, top
from visionattn.frozen.tokens import SCORES, prune_tokens

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "dossiers" / "golden"
IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**settings, **options}).eval()


@torch.no_grad()
def test_zeroth_order_sensitivity_and_choice_of_the_golden_case():
    file = GOLDEN / "zoo_prune.npz"
    if not file.exists():
        pytest.skip("the golden numbers are not here")
    case = {name: torch.from_numpy(array) for name, array in np.load(file).items()}

    def network(x):
        return F.gelu(F.layer_norm(x, (16,)) @ case["w1"] + case["b1"]) @ case["w2"] + case["b2"]

    scores = sensitivity(network, case["x"][None], case["directions"], float(case["c"]))
    torch.testing.assert_close(scores[0], case["sensitivity"], atol=1e-9, rtol=0)
    assert greedy(scores, network(case["x"][None]), 10)[0].tolist() == case["kept"].tolist()


def test_sensitivity_of_a_linear_function_is_its_norm():
    matrix = torch.diag(torch.tensor([3.0, 0.0]).double())
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    got = sensitivity(lambda x: x @ matrix, torch.randn(1, 4, 2).double(), directions)
    torch.testing.assert_close(got, torch.full((1, 4), 1.5).double())  # the mean of 3 and 0


def test_a_dither_matrix_makes_a_checkerboard_and_then_a_grid():
    order = dither_order(4, 6)
    half = top(order[None], 12)[0]
    assert all((int(cell) // 6 + int(cell) % 6) % 2 == 0 for cell in half)
    quarter = top(order[None], 6)[0]
    assert quarter.tolist() == [0, 2, 4, 12, 14, 16]


def test_each_cell_is_filled_by_the_nearest_kept_one():
    assert nearest_kept(torch.tensor([[0, 5]]), 2, 3)[0].tolist() == [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("share", [(1, 2), (2, 5), (1, 8), (1, 100)])
def test_merging_gives_means_of_groups(share):
    x = torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(1)).double()
    merged, owner = merge(x, share)
    assert merged.shape[1] == -(-13 * share[0] // share[1])
    for image in range(2):
        for group in range(merged.shape[1]):
            torch.testing.assert_close(merged[image, group], x[image][owner[image] == group].mean(0))


def test_equal_tokens_are_merged_first():
    x = torch.eye(4).repeat_interleave(2, dim=0)[None]
    merged, owner = merge(x, (1, 2))
    assert sorted(map(tuple, merged[0].tolist())) == sorted(map(tuple, torch.eye(4).tolist()))
    assert owner[0, ::2].tolist() == owner[0, 1::2].tolist()


@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_dense_maps_are_filled_and_prefix_tokens_stay(score):
    model = vit(reg_tokens=2)
    whole = copy.deepcopy(model)
    savings = prune_tokens(model, 0.5, at=2, score=score)
    if score != "sensitivity":  # which costs more than it saves
        assert savings.macs_after < savings.macs_before
    assert savings.parameters_after == savings.parameters_before
    outputs = model.forward_intermediates(IMAGES, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    dense = whole.forward_intermediates(IMAGES, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    assert [len(tokens[0].unique(dim=0)) for tokens, _ in outputs] == [36, 36, 18, 18]
    assert outputs[3][1].shape == (2, 3, 16)
    assert torch.equal(outputs[1][0], dense[1][0])
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IMAGES), model(IMAGES))
    prune_tokens(model, 1)
    assert torch.equal(model(IMAGES), whole(IMAGES))


@torch.no_grad()
def test_kept_tokens_are_those_that_a_model_of_these_alone_computes():
    model = vit()
    whole = copy.deepcopy(model)
    prune_tokens(model, 0.25, at=2, score="grid")
    tokens = whole.forward_intermediates(
        IMAGES, indices=[1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    patches, prefix = tokens[0]
    kept = top(dither_order(6, 6)[None], 9)[0]
    alone = whole.norm(whole.blocks[2:](torch.cat([prefix, patches[:, kept]], dim=1)))
    got = model.forward_features(IMAGES)
    torch.testing.assert_close(got[:, :1], alone[:, :1])
    torch.testing.assert_close(got[:, 1 + kept], alone[:, 1:])


@torch.no_grad()
def test_the_class_token_chooses_what_it_looks_at():
    model = vit()
    seen = []
    with observing(model, seen.append):
        model(IMAGES)
    weights = (seen[1].q @ seen[1].k.transpose(2, 3) * seen[1].scale).softmax(-1)
    best = top(weights[:, :, 0, 1:].mean(1), 9)
    prune_tokens(model, 0.25, at=2, score="class")
    cut = next(h.__self__ for h in model.blocks[2]._forward_hooks.values())
    model(IMAGES)
    assert cut.kept.tolist() == best.tolist()


@torch.no_grad()
def test_a_model_of_fewer_heads_and_tokens_exports(tmp_path):
    model = vit(depth=2)
    prune_heads(model, IMAGES, 0.75)
    prune_tokens(model, 0.5, at=1)
    model.pretrained_cfg = {"input_size": (3, 24, 24), "fixed_input_size": True, "architecture": "toy"}
    (file,) = visionattn.export(model, tmp_path / "model.onnx")
    assert file.rows
    assert all(row.error <= row.allowed for row in file.rows)
    assert copy.deepcopy(model)(IMAGES).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({}, {"keep": 0}, "above 0"),
        ({}, {"keep": 1.5}, "at most 1"),
        ({}, {"keep": float("nan")}, "share"),
        ({}, {"keep": 0.5, "at": 4}, "from 0 to 3"),
        ({}, {"keep": 0.5, "at": 0, "score": "class"}, "from 1 to 3"),
        ({}, {"keep": 0.5, "score": "best"}, "must be one of 'merge'"),
        ({"class_token": False, "global_pool": "avg"}, {"keep": 0.5, "score": "class"}, "no class token"),
    ],
)
def test_mistakes_are_named(options, arguments, words):
    with pytest.raises(InputError, match=words):
        prune_tokens(vit(**options), **arguments)


def test_models_that_cannot_be_pruned_stay_as_they_are():
    with pytest.raises(InputError, match="no blocks"):
        prune_tokens(timm.create_model("resnet18"), 0.5)
    model = timm.create_model("eva02_tiny_patch14_224", depth=2)
    with pytest.raises(InputError, match="positions"):
        prune_tokens(model, 0.5)
    model = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(InputError):
        prune_tokens(model, 0.5, at=1)
    assert not any(block._forward_hooks for block in model.blocks)
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(InputError, match="does not read attention"):
        prune_tokens(model, 0.5, score="received")
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("name", ["mixer_s32_224", "hiera_tiny_224"])
def test_embeddings_that_do_not_tell_the_size_are_refused(name):
    with pytest.raises(InputError, match="has no patch_embed with"), torch.device("meta"):
        prune_tokens(timm.create_model(name), 0.5)
