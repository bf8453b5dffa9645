"""Weighted metrics against torchmetrics and scipy, on images as they are and on a draw that repeats them."""

import numpy as np
import pytest
import torch

from visionattn.metrics.targets import average_precision, draws, mean_absolute_error, r2_score, spearman

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.normal(size=40)
PREDICTION = np.round(TRUTH + RANDOM.normal(size=40), 1)  # with equal values
CLASS = (TRUTH > 0.3).astype(float)


def references():
    functional = pytest.importorskip("torchmetrics.functional")
    stats = pytest.importorskip("scipy.stats")
    tensor = torch.from_numpy
    return {
        average_precision: lambda p, t: functional.average_precision(tensor((p + 9) / 18), tensor(t).long(), "binary"),
        r2_score: lambda p, t: functional.r2_score(tensor(p), tensor(t)),
        mean_absolute_error: lambda p, t: functional.mean_absolute_error(tensor(p), tensor(t)),
        spearman: lambda p, t: stats.spearmanr(p, t).statistic,
    }


@pytest.mark.parametrize("metric", [average_precision, r2_score, mean_absolute_error, spearman])
def test_references(metric):
    truth = CLASS if metric is average_precision else TRUTH
    weights = np.concatenate([np.ones((1, 40)), draws(40, 3)])
    found = metric(PREDICTION, truth, weights)
    for own, counts in zip(found, weights):
        rows = np.repeat(np.arange(40), counts.astype(int))
        assert own == pytest.approx(float(references()[metric](PREDICTION[rows], truth[rows])), abs=1e-6)


def test_what_is_not_defined():
    ones = np.ones((1, 40))
    assert np.isnan(average_precision(PREDICTION, np.zeros(40), ones))
    assert np.isnan(r2_score(PREDICTION, np.ones(40), ones))
    assert np.isnan(spearman(np.ones(40), TRUTH, ones))


def test_draws():
    found = draws(7, 5)
    assert found.shape == (5, 7)
    assert found.sum(1).tolist() == [7] * 5
    assert np.array_equal(found, draws(7, 5))
    assert average_precision(np.array([0.9, 0.2, 0.5]), np.array([1.0, 1, 0]), np.ones((1, 3))) == pytest.approx(5 / 6)
