"""In-context regression: anchors against numbers computed elsewhere, and what softmax attention learns."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.arena import regression
from visionattn.arena.plan import Plan

GOLDEN = Path(__file__).parents[3] / "shared/dossiers/golden/icl.npz"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the numbers are not here")
def test_estimates_of_the_anchors():
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    given = golden["x"], golden["y"], golden["xq"]
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(regression.ridge(*given), golden["ridge"], **close)
    torch.testing.assert_close(regression.gradient_descent(*given), golden["gd"], **close)
    torch.testing.assert_close(regression.gradient_descent(*given, debiased=True), golden["debiased_gd"], **close)
    two = regression.one_head(*given, 0.1) - regression.one_head(*given, -0.1)
    torch.testing.assert_close(two, golden["two_head_c01"], **close)


def test_errors_of_the_anchors():
    # Of 40,000 sequences, with the best step and the best temperature: .1129, .2373, .2405, .4046.
    expected = {"ridge": 0.1129, "gradient descent": 0.2373, "debiased gradient descent": 0.2405, "one head": 0.4046}
    found = regression.anchors(8000)
    assert list(found) == list(regression.ANCHORS)
    for name, error in expected.items():
        assert found[name] == pytest.approx(error, rel=0.03)


def test_two_heads_of_small_temperature_are_debiased_gradient_descent():
    x, y, query, _ = regression.draw(20, 40, 0, torch.float64)
    c = 1e-5
    two = (regression.one_head(x, y, query, c) - regression.one_head(x, y, query, -c)) / (2 * c)
    torch.testing.assert_close(two, regression.gradient_descent(x, y, query, debiased=True), rtol=0, atol=1e-8)


def test_tokens_on_a_grid():
    examples = regression.draw(5, 40, 0)
    tokens, cells = regression.on_grid(examples, (6, 7), 0)
    assert tokens.shape == (5, 42, 6)
    asked = tokens[torch.arange(5), cells]
    torch.testing.assert_close(asked[:, :5], examples.query)
    assert (asked[:, 5] == 0).all()
    torch.testing.assert_close(tokens[..., 5].sum(dim=1), examples.y.sum(dim=1))


def test_no_mixing_has_the_variance_of_the_value():
    found = regression.run("identity", 0, Plan(regression_steps=30, sequences=2000), torch.device("cpu"))
    assert [entry.setting for entry in found] == ["L=40", "L=80"]
    assert found[0].value == pytest.approx(1.1, rel=0.1)
