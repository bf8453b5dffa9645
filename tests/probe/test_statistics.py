import math

import numpy as np
import pytest
import torch

from visionattn.errors import InputError
from visionattn.probe.statistics import (
    bootstrap_interval,
    calibration_error,
    holm_correction,
    mcnemar_test,
    share_interval,
    t_interval,
    wilson_interval,
)


def test_wilson_is_the_textbook_s():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 0 of 20, without continuity correction.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_bootstrap_is_near_the_normal_interval_and_seeded():
    scores = np.random.default_rng(0).exponential(size=2000)
    interval = bootstrap_interval(scores, seed=1)
    reach = 1.96 * scores.std() / 2000**0.5
    assert interval == pytest.approx((scores.mean() - reach, scores.mean() + reach), abs=0.1 * reach)
    assert interval == bootstrap_interval(scores, seed=1)
    with pytest.raises(InputError, match="two images"):
        bootstrap_interval(scores[:1])


def test_mcnemar_is_the_binomial_s():
    one = np.array([True] * 10 + [False] * 2 + [True] * 30)
    other = np.array([False] * 10 + [True] * 2 + [True] * 30)
    p = 2 * sum(math.comb(12, count) for count in range(3)) / 2**12
    assert mcnemar_test(one, other) == pytest.approx(p)
    assert mcnemar_test(one, one) == 1
    with pytest.raises(InputError, match="same images"):
        mcnemar_test(one, other[1:])


def test_calibration_error_is_the_mean_distance_of_the_bins():
    confidences = torch.tensor([0.51, 0.52, 0.95, 0.99, 0.97, 0.96])
    correct = torch.tensor([True, False, True, True, True, False])
    low, high = abs(0.515 - 0.5) * 2 / 6, abs(confidences[2:].mean() - 0.75) * 4 / 6
    assert calibration_error(confidences, correct) == pytest.approx(float(low + high), abs=1e-6)


def test_t_interval():
    # Four degrees of freedom: t = 2.776.
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        (3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5), abs=1e-3
    )
    assert all(math.isnan(end) for end in t_interval([0.5]))


def test_the_interval_of_shares_stays_within_0_and_1():
    values = [0.95, 1.0, 1.0, 1.0]
    # Three degrees of freedom: t = 3.182; mean 0.9875, its deviation 0.0125, on the logit scale 1.0127.
    ends = [1 / (1 + math.exp(-(math.log(0.9875 / 0.0125) + sign * 3.182 * 1.0127))) for sign in (-1, 1)]
    assert share_interval(values) == pytest.approx(ends, abs=1e-4)
    for few in ([0.22, 0.44], [0.2, 0.3, 0.9], [0.5], []):
        assert all(math.isnan(end) for end in share_interval(few))
    random = np.random.default_rng(0)
    for _ in range(200):
        draws = random.beta(0.3, 0.3, 5)
        low, high = share_interval(draws)
        assert 0 <= low <= draws.mean() <= high <= 1
    assert share_interval([1.0] * 4) == (1, 1)


def test_holm_multiplies_by_the_tests_that_are_left():
    # p times the tests that are left, never falling.
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.9, 0.8]) == [1.0, 1.0]
    assert holm_correction([]) == []
