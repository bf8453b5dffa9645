"""Scores of classes: those of scikit-learn, the worst first."""

import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from visionattn.probe.classes import class_scores

NAMES = ("cat", "dog", "owl", "yak", "never")


def test_they_are_those_of_scikit_learn():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=random)
    predictions = torch.where(torch.rand(200, generator=random) < 0.6, labels, labels * 2 % 5)
    found = class_scores(predictions, labels, NAMES)
    assert {score.name for score in found} == set(NAMES[:4])  # one class has no images
    expected = precision_recall_fscore_support(labels, predictions, labels=range(4), zero_division=0)
    for score in found:
        ours = score.precision, score.recall, score.f1, score.support
        assert ours == pytest.approx([column[NAMES.index(score.name)] for column in expected])
    assert [score.f1 for score in found] == sorted(score.f1 for score in found)


def test_the_commonest_mistake_is_named():
    labels, predictions = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0, 1, 2, 2, 1, 2])
    cat, owl, dog = class_scores(predictions, labels, ("cat", "dog", "owl"))
    assert (cat.name, cat.taken_for, cat.times, cat.support) == ("cat", "owl", 2, 4)
    assert (dog.taken_for, owl.taken_for) == (None, None)
    assert cat.precision == 1
    assert cat.recall == pytest.approx(1 / 4)
