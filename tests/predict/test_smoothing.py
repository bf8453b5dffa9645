from __future__ import annotations

import numpy as np
import pytest

from visionattn.predict.smoothing import TURNS, smooth

rng = np.random.default_rng(0)


def by_dense_systems(values, confidence, image, strength, contrast):
    """The definition: one dense system per row or column."""

    def solve(f, colours, strength):
        weights = strength * np.exp(-np.linalg.norm(np.diff(colours, axis=0), axis=1) / contrast)
        laplacian = np.zeros((len(f), len(f)))
        for i, weight in enumerate(weights):
            laplacian[i : i + 2, i : i + 2] += weight * np.array([[1, -1], [-1, 1]])
        return np.linalg.solve(np.eye(len(f)) + laplacian, f)

    def smoothed(f):
        for turn in range(1, TURNS + 1):
            part = 1.5 * strength * 4 ** (TURNS - turn) / (4**TURNS - 1)
            f = np.stack([solve(f[y], image[y], part) for y in range(f.shape[0])])
            f = np.stack([solve(f[:, x], image[:, x], part) for x in range(f.shape[1])], 1)
        return f

    return smoothed(confidence * values) / smoothed(confidence)


@pytest.mark.parametrize("size", [(7, 9), (1, 5), (4, 1)])
def test_the_recursion_solves_the_systems(size):
    values, confidence = rng.uniform(1, 50, size), rng.uniform(0.1, 1, size)
    image = rng.integers(0, 20, (*size, 3)).astype(np.uint8)
    expected = by_dense_systems(values, confidence, image.astype(float), 30.0, 5.0)
    np.testing.assert_allclose(smooth(values, confidence, image, 30.0, 5.0), expected, rtol=1e-12)


def test_values_cross_no_edge():
    image = np.zeros((6, 12, 3), np.uint8)
    image[:, 6:] = 255
    values = np.where(np.arange(12) < 6, 2.0, 7.0) + np.zeros((6, 1))
    known = values.copy()
    known[1:5, 1:] = np.nan
    known[0, 8] = np.nan
    known[5, 7:] = np.nan
    found = smooth(known, np.ones((6, 12)), image, 1000, 2)
    np.testing.assert_allclose(found, values, rtol=1e-6)


def test_confidence_decides_between_neighbours():
    image = np.zeros((5, 5, 3), np.uint8)
    values = np.full((5, 5), 3.0)
    values[2, 2] = 100.0
    confidence = np.ones((5, 5))
    plain = smooth(values, confidence, image, 1000, 2)
    confidence[2, 2] = 1e-6
    assert abs(smooth(values, confidence, image, 1000, 2) - 3).max() < 1e-3 < plain[2, 2] - 3


def test_nothing_known_stays_unknown():
    assert np.isnan(smooth(np.full((3, 4), np.nan), np.ones((3, 4)), np.zeros((3, 4, 1)), 10, 2)).all()
    assert np.isnan(smooth(np.ones((3, 4)), np.zeros((3, 4)), np.zeros((3, 4, 1)), 10, 2)).all()


def test_no_strength_changes_nothing():
    values = rng.uniform(1, 50, (6, 8))
    np.testing.assert_allclose(smooth(values, np.full((6, 8), 0.5), rng.uniform(0, 255, (6, 8, 3)), 0, 2), values)
