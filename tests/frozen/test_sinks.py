"""Detectors of sinks, redistribution and emphasis."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from visionattn.errors import InputError
from visionattn.frozen import observing
from visionattn.frozen.sinks import (
    attends_image,
    channel_share,
    channel_sinks,
    emphasise,
    emphasising,
    local_tokens,
    outliers,
    received_attention,
    received_sinks,
    redistribute,
    redistributing,
    take_at_random,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "dossiers" / "golden"
EXACT = {"atol": 1e-12, "rtol": 0}
IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def golden(name):
    file = GOLDEN / f"{name}.npz"
    if not file.exists():
        pytest.skip("the golden numbers are not here")
    return {key: torch.from_numpy(np.asarray(array)) for key, array in np.load(file).items()}


def columns(indices, count):
    mask = torch.zeros(count, dtype=torch.bool)
    mask[indices] = True
    return mask


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**settings, **options}).eval()


def test_var_finds_sinks_and_moves_their_share():
    case = golden("var")
    sinks = channel_sinks(case["hidden"], float(case["tau"]) ** 2 / 512, case["sink_dims"])[0]
    assert sinks.nonzero().flatten().tolist() == case["sink_tokens"].tolist()
    start, length = int(case["image_start"]), int(case["image_len"])
    image = columns(range(start, start + length), 24)
    rows = attends_image(case["attention"], image, sinks, float(case["summ"]), float(case["rho"]))
    assert torch.equal(rows.nonzero(), case["selected"])
    rows &= torch.arange(24) >= start + length
    got = redistribute(case["attention"], sinks, image & ~sinks, float(case["p"]), rows)
    torch.testing.assert_close(got, case["redistributed"], **EXACT)


def test_act_calibrates_one_head():
    case = golden("act")
    attention, head = case["attention"], int(case["head"])
    seen_by = (24 - torch.arange(24).double()) / 24  # in causal attention, fewer queries can see later columns
    received = received_attention(attention[0]) / seen_by / 24
    torch.testing.assert_close(received[head], case["received"], **EXACT)
    sinks = (received[head] > float(case["threshold"])).nonzero().flatten().tolist()
    assert sinks == [0, *case["sink_columns"].tolist()]
    got = attention.clone()
    got[:, head] = redistribute(attention[:, head], columns(sinks[1:], 24), beta=float(case["beta"]))
    torch.testing.assert_close(got, case["calibrated"], **EXACT)


def test_paint_finds_outliers_and_raises_logits():
    case = golden("paint")
    first, late = (case[f"vit_attention_{name}"][0, :, 0, 1:].sum(0) for name in ("first", "penultimate"))
    summary = outliers(late)
    local = local_tokens(first, summary)
    assert summary.nonzero().flatten().tolist() == sorted(case["summary_tokens"].tolist())
    assert local.nonzero().flatten().tolist() == sorted(case["local_tokens"].tolist())
    start = int(case["image_start"])
    masks = [torch.zeros(74, dtype=torch.bool) for _ in range(2)]
    for mask, values in zip(masks, (local, summary), strict=True):
        mask[start : start + 64] = values
    got = case["logits"].clone()
    got[..., -1, :] = emphasise(got[..., -1, :], *masks, float(case["alpha"]), float(case["beta"]))
    torch.testing.assert_close(got, case["boosted"], **EXACT)
    torch.testing.assert_close(got.softmax(-1), case["probabilities"], **EXACT)


def test_rows_sum_to_one_with_one_query_too():
    weights = torch.rand(2, 3, 1, 9, dtype=torch.float64).softmax(-1)
    sinks = columns([0, 4], 9)
    got = redistribute(weights, sinks, beta=0.4)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 1).double())
    torch.testing.assert_close(got[..., sinks], 0.4 * weights[..., sinks])
    others = got[..., ~sinks] / weights[..., ~sinks]
    torch.testing.assert_close(others, others[..., :1].expand_as(others))
    assert torch.equal(redistribute(weights, columns(range(9), 9)), weights)  # nothing can receive


def test_shares_of_channels_and_columns():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(channel_share(x), torch.tensor([16 / 25, 1.0, 0.0]))
    torch.testing.assert_close(channel_share(x, [0]), torch.tensor([9 / 25, 0.0, 0.0]))
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.9, 0.1, 0.0, 0.0]])
    torch.testing.assert_close(received_attention(weights), torch.tensor([2.8, 0.7, 0.5, 0.0]))
    assert received_sinks(weights, 2).tolist() == [True, False, False, False]
    assert outliers(torch.tensor([1.0, 2, 3, 4, 100])).tolist() == [False] * 4 + [True]


@torch.no_grad()
def test_only_rows_of_the_class_token_change():
    model = vit(depth=1)
    calls = []
    with observing(model, calls.append):
        before = model.forward_features(IMAGES)
    call = calls[0]
    with redistributing(model, beta=0.25):
        after = model.forward_features(IMAGES)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
    weights = (call.q[:, :, :1] @ call.k.transpose(2, 3) * call.scale).softmax(-1)
    sinks = torch.nn.functional.pad(outliers(weights[..., 1:].sum(1, keepdim=True)), (1, 0))
    assert sinks.any()
    attended = redistribute(weights, sinks, torch.arange(37) > 0, 0.25) @ call.v
    block, x = model.blocks[0], model._pos_embed(model.patch_embed(IMAGES))[:, :1]
    x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
    x = model.norm(x + block.mlp(block.norm2(x)))
    torch.testing.assert_close(after[:, :1], x, atol=1e-5, rtol=1e-4)
    assert not torch.equal(after[:, :1], before[:, :1])


@pytest.mark.parametrize("detector", ["outliers", "received", "random"])
@torch.no_grad()
def test_sinks_that_keep_everything_change_nothing(detector):
    model = vit()
    with redistributing(model, 1.0, detector):
        got = model(IMAGES)
    torch.testing.assert_close(got, model(IMAGES))


def test_the_control_moves_as_much():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 1, 30, generator=generator).double().softmax(-1)
    patches = torch.arange(30) > 0
    moved = torch.tensor([0.1, 0.3]).double()[:, None, None, None].expand(2, 3, 1, 1)
    got = take_at_random(weights, patches, moved, generator)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 1).double())
    torch.testing.assert_close((weights - got).clamp_min(0).sum(-1, keepdim=True), moved)
    assert torch.equal(got[..., 0], weights[..., 0])
    lost = (got < weights).any(1)
    assert not torch.equal(lost[0], lost[1])


@torch.no_grad()
def test_heads_are_chosen_by_layer():
    model = vit(depth=1)
    whole = model.forward_features(IMAGES)
    with redistributing(model, 0.1, heads={"blocks.1.*": [0]}):
        assert torch.equal(model.forward_features(IMAGES), whole)
    with redistributing(model, 0.1, heads={"blocks.0.*": [0, 1]}):
        both = model.forward_features(IMAGES)
    with redistributing(model, 0.1):
        torch.testing.assert_close(model.forward_features(IMAGES), both)


@torch.no_grad()
def test_attentive_pooling_is_reached():
    model = vit(class_token=False, global_pool="map")
    before = model(IMAGES)
    with redistributing(model, 0.0, layers="attn_pool*") as reached:
        after = model(IMAGES)
    assert reached.layers == ["attn_pool"]
    assert not torch.equal(before, after)


@torch.no_grad()
def test_emphasis_changes_the_class_token():
    model = vit(depth=1)
    before = model.forward_features(IMAGES)
    with emphasising(model):
        after = model.forward_features(IMAGES)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])
    with emphasising(model, 0.0, 0.0):
        torch.testing.assert_close(model.forward_features(IMAGES), before)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="must be one of 'outliers'"):
        redistributing(vit(), detector="best")
    with pytest.raises(InputError, match=r"from 0 to 1; got 1\.5"):
        redistributing(vit(), beta=1.5)
    with pytest.raises(InputError, match="from 0 to 1; got -1"):
        redistribute(torch.ones(2, 2) / 2, columns([0], 2), beta=-1)
    with pytest.raises(InputError, match="supports inference only"), redistributing(model := vit()):
        model(IMAGES)
