"""Counts of pixels against torchmetrics, a case by hand, and boundaries against erosion by loops."""

import math

import numpy as np
import pytest
import torch

from visionattn.metrics.segmentation import (
    boundary,
    count_boundary,
    count_pixels,
    iou,
    mean_iou,
    pixel_accuracy,
)

HAND = (torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.tensor([[0, 1, 1], [1, 255, 0]]))


def test_a_case_by_hand():
    counts = count_pixels(*HAND, num_classes=4)
    assert counts.tolist() == [[1, 2, 0, 0], [2, 2, 1, 0], [2, 3, 0, 0]]
    assert iou(counts)[:3].tolist() == [1 / 3, 2 / 3, 0]
    assert iou(counts)[3].isnan()
    assert float(mean_iou(counts)) == pytest.approx(1 / 3)
    assert float(pixel_accuracy(counts)) == 3 / 5


@pytest.mark.parametrize("present", [5, 3])
def test_torchmetrics(present):
    classification = pytest.importorskip("torchmetrics.functional.classification")
    random = np.random.default_rng(present)
    truth = torch.from_numpy(random.integers(0, present, (4, 37, 23)))
    prediction = torch.where(torch.from_numpy(random.random((4, 37, 23)) < 0.6), truth, (truth + 1) % present)
    truth[torch.from_numpy(random.random((4, 37, 23)) < 0.1)] = 255
    counts = torch.stack([count_pixels(p, t, 5) for p, t in zip(prediction, truth)]).sum(0)
    options = {"num_classes": 5, "ignore_index": 255}
    expected = classification.multiclass_jaccard_index(prediction, truth, average="macro", **options)
    assert float(mean_iou(counts)) == pytest.approx(float(expected), abs=1e-6)
    each = classification.multiclass_jaccard_index(prediction, truth, average="none", **options)
    assert iou(counts).nan_to_num(0).tolist() == pytest.approx(each.tolist(), abs=1e-6)
    expected = classification.multiclass_accuracy(prediction, truth, average="micro", **options)
    assert float(pixel_accuracy(counts)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("distance", [1, 2])
def test_boundary_is_what_erosion_takes_away(distance):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (3, 4))).repeat_interleave(5, 0)
    labels = labels.repeat_interleave(4, 1)
    height, width = labels.shape
    expected = torch.zeros_like(labels, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            window = range(-distance, distance + 1)
            near = [(y + dy, x + dx) for dy in window for dx in window]
            expected[y, x] = any(
                not (0 <= j < height and 0 <= i < width) or labels[j, i] != labels[y, x] for j, i in near
            )
    assert torch.equal(boundary(labels, distance), expected)


def test_boundary_counts_leave_the_inside_out():
    truth = torch.zeros(100, 100, dtype=torch.long)  # d = round(0.02 * 141.4) = 3
    truth[30:70, 30:70] = 1
    moved = torch.zeros_like(truth)
    moved[31:71, 30:70] = 1
    ring = 40**2 - 34**2
    assert count_boundary(truth, truth, 2)[:, 1].tolist() == [ring] * 3
    hits = 2 * (2 * 40) + 35 * 6  # two rows above and below, and the sides
    assert count_boundary(moved, truth, 2)[:, 1].tolist() == [hits, ring, ring]
    # A shift of one pixel costs 5 % of the square and 29 % of its boundary.
    assert float(iou(count_pixels(moved, truth, 2))[1]) == pytest.approx(39 / 41)
    assert float(iou(count_boundary(moved, truth, 2))[1]) == pytest.approx(hits / (2 * ring - hits))


def test_ignored_pixels_are_counted_nowhere():
    truth = torch.zeros(40, 40, dtype=torch.long)
    truth[:, 20:] = 1
    truth[:, 18:22] = 255
    prediction = torch.where(truth == 255, 2, truth)
    assert float(mean_iou(count_pixels(prediction, truth, 3))) == 1
    assert float(mean_iou(count_boundary(prediction, truth, 3))) == 1
    nothing = torch.full((4, 4), 255)
    assert math.isnan(float(mean_iou(count_pixels(nothing * 0, nothing, 3))))
