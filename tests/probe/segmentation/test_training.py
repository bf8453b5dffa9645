"""What heads reach: everything where the tokens hold the answer, chance where they hold nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.probe.arrays import ArrayFeatures
from visionattn.errors import DataError
from visionattn.metrics.segmentation import mean_iou, pixel_accuracy
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.segmentation.heads import predict_masks
from visionattn.probe.segmentation.training import score_segmenter, train_segmenters

GRID = (4, 6)
OPTIONS = {"epochs": 25, "batch_size": 8, "warmup_epochs": 1, "holdout": 0.1}


def stripes(count, seed, known=True):
    """Tokens that say the class of their column, or nothing, and its classes (n, 4, 6); boundaries lie on patches."""
    random = np.random.default_rng(seed)
    classes = torch.from_numpy(random.integers(0, 3, (count, 1, GRID[1]))).expand(count, *GRID)
    tokens = torch.from_numpy(random.normal(size=(count, 24, 3))).float()
    if known:
        tokens = 0.01 * tokens + torch.nn.functional.one_hot(classes.flatten(1), 3)
    features = ArrayFeatures([tokens], torch.zeros(count, dtype=torch.long), 3)
    features.layers = (dataclasses.replace(features.layers[0], grid=GRID),)
    return features, classes


def enlarged(classes, factor):
    return classes.repeat_interleave(factor, -1).repeat_interleave(factor, -2).byte()


@pytest.fixture(scope="module", params=["linear", "attentive"])
def answered(request):
    train, truth = stripes(60, 0)
    [result], held = train_segmenters(train, enlarged(truth, 4), [HeadSpec(request.param, 0, "adamw", 0.03)], **OPTIONS)
    assert held == 6
    return result


def test_tokens_that_hold_the_answer_reach_everything(answered):
    test, truth = stripes(10, 1)
    masks = enlarged(truth, 8)
    score_segmenter([answered], test, lambda row: masks[row])
    counts = answered.pixels.sum(0)
    # The attentive head's logits depend on the image, so that their boundaries are not midway between tokens.
    slack = 0.0 if answered.spec.pooling == "linear" else 0.1
    assert answered.held_out == pytest.approx(1, abs=slack)
    assert float(mean_iou(counts)) == pytest.approx(1, abs=slack)
    assert float(mean_iou(answered.boundaries.sum(0))) == 1 or slack
    assert int(counts[2].sum()) == 10 * 32 * 48


def test_each_image_is_judged_at_the_size_of_its_mask(answered):
    test, truth = stripes(4, 2)
    masks = [enlarged(truth[row], factor) for row, factor in enumerate((1, 3, 5, 10))]
    score_segmenter([answered], test, lambda row: masks[row])
    assert answered.pixels[:, 2].sum(1).tolist() == [24 * factor**2 for factor in (1, 3, 5, 10)]
    assert mean_iou(answered.pixels)[:3].tolist() == [1.0] * 3


def test_ignored_pixels_train_nothing(answered):
    train, truth = stripes(60, 0)
    masks = enlarged(truth, 4)
    lies = torch.zeros_like(masks, dtype=torch.bool)
    lies[:, :, ::2] = True
    other = torch.where(lies, 255, masks.int()).byte()
    spec = HeadSpec(answered.spec.pooling, 0, "adamw", 0.03)
    [result], _ = train_segmenters(train, other, [spec], **OPTIONS)
    assert result.held_out == 1
    nothing = torch.full_like(masks, 255)
    [result], _ = train_segmenters(train, nothing, [spec], **{**OPTIONS, "epochs": 1})
    assert not result.diverged
    assert math.isnan(result.held_out)


@pytest.mark.parametrize("name", ["linear", "attentive"])
def test_tokens_that_hold_nothing_reach_chance(name):
    train, truth = stripes(60, 0, known=False)
    [result], _ = train_segmenters(train, enlarged(truth, 4), [HeadSpec(name, 0, "adamw", 0.001)], **OPTIONS)
    test, truth = stripes(40, 1, known=False)
    masks = enlarged(truth, 4)
    score_segmenter([result], test, lambda row: masks[row])
    counts = result.pixels.sum(0)
    # Of three equally frequent classes a guess has 1/3 of the pixels and an IoU of 1/5, one class alone 1/9.
    assert float(pixel_accuracy(counts)) == pytest.approx(1 / 3, abs=0.05)
    assert float(mean_iou(counts)) < 0.22


def test_heads_become_what_they_become_alone():
    train, truth = stripes(30, 0)
    specs = [HeadSpec("linear", 0, "adamw", lr, seed=seed) for lr, seed in ((0.01, 0), (0.03, 1))]
    together, _ = train_segmenters(train, enlarged(truth, 4), specs, **{**OPTIONS, "epochs": 2})
    alone, _ = train_segmenters(train, enlarged(truth, 4), specs[1:], **{**OPTIONS, "epochs": 2})
    torch.testing.assert_close(together[1].head.state_dict(), alone[0].head.state_dict())
    again, _ = train_segmenters(train, enlarged(truth, 4), specs[1:], **{**OPTIONS, "epochs": 2})
    assert torch.equal(again[0].head.classifier.weight, alone[0].head.classifier.weight)


def test_a_head_that_diverges_is_left_behind():
    train, truth = stripes(30, 0)
    train.patches[0][:] = 1e30 * train.patches[0]
    train.patches[0][3, 0, 0] = math.inf
    [result], _ = train_segmenters(train, enlarged(truth, 4), [HeadSpec("linear", 0, "adamw", 0.01)], **OPTIONS)
    assert result.diverged == 1
    assert math.isnan(result.held_out)


def test_too_few_images():
    train, truth = stripes(2, 0)
    with pytest.raises(DataError, match="at least three training images; got 2"):
        train_segmenters(train, enlarged(truth, 4), [HeadSpec("linear", 0)], **OPTIONS)


def test_prediction_of_one_image(answered):
    test, truth = stripes(1, 3)
    assert torch.equal(predict_masks(answered.head, test.patches[0], GRID, GRID), truth[0])
    whole = predict_masks(answered.head, test.patches[0], GRID, (30, 41))
    for numbers in (1, 30 * 41 * 2):  # one class, and two, at once
        assert torch.equal(predict_masks(answered.head, test.patches[0], GRID, (30, 41), numbers), whole)
