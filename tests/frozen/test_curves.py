"""Pruned models compared with their controls."""

import copy

import timm
import torch

from visionattn.cost import count_macs
from visionattn.frozen.curves import drop_blocks, image_features, prune_curves

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**{**settings, **options}).eval()


@torch.no_grad()
def test_inner_blocks_are_left_out():
    model = vit()
    smaller = drop_blocks(model, 1)
    wanted = copy.deepcopy(model)
    wanted.blocks = wanted.blocks[:2] + wanted.blocks[3:]
    assert torch.equal(smaller(IMAGES), wanted(IMAGES))
    assert len(drop_blocks(model, 2).blocks) == 2
    assert len(model.blocks) == 4


def test_rows_are_of_the_models_that_they_name():
    model = vit()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    rows = prune_curves(model, IMAGES, labels, keep=[0.5], at=2, scores=["merge"])
    names = [(row["method"], row["score"]) for row in rows]
    assert names == [
        ("whole", ""),
        ("blocks", ""),
        ("tokens", "merge"),
        ("heads", "usage"),
        ("heads", "norm"),
        ("heads", "random"),
    ]
    whole = rows[0]
    assert whole["error"] == 0
    assert whole["macs"] == count_macs(model, (3, 16, 16))
    assert all(row["macs"] < whole["macs"] and row["error"] > 0 for row in rows[1:])
    assert rows[1]["parameters"] < whole["parameters"]
    assert rows[2]["parameters"] == whole["parameters"]
    for row in rows:
        assert row["accuracy"] == float(row["correct"].double().mean())
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    unlabelled = prune_curves(model, IMAGES, keep=[0.5], heads=False, scores=["grid"])
    assert [row["accuracy"] for row in unlabelled] == [None] * 3


def test_vectors_are_class_tokens_or_means_of_patches():
    model = vit()
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
    torch.testing.assert_close(image_features(model, IMAGES, "class"), tokens[:, 0])
    torch.testing.assert_close(image_features(model, IMAGES), tokens[:, 1:].mean(1))
