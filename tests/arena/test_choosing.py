"""Which mixer when: what may be said of numbers."""

from pathlib import Path

import pytest

from visionattn.arena.choosing import choose, judge
from visionattn.arena.plan import Plan
from visionattn.arena.results import RECALL, REGRESSION, Arena
from visionattn.arena.rows import Row


def arena(values, measure="recall", setting="K=16", seeds=3):
    rows = [
        Row("recall", mixer, seed, measure, setting, value, "", "cpu", 1, "", "", 0.0)
        for mixer, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]
    return Arena(Path(), list(values), rows, Plan(seeds=seeds), None)


VALUES = {
    "softmax": [0.50, 0.51, 0.52],
    "hsa": [0.60, 0.62, 0.62],
    "window": [0.40, 0.41, 0.43],
    "dma": [0.60, 0.45, 0.52],
    "lssa": [0.50, 0.51, 0.52],
}


def test_differences_are_judged_by_intervals():
    found = judge(arena(VALUES), RECALL)
    assert found == {"better": ["hsa"], "worse": ["window"], "some seeds": ["dma"], "equal": ["lssa"]}
    errors = judge(arena(VALUES, "regression error", "L=40"), REGRESSION)
    assert errors["better"] == ["window"]
    assert errors["worse"] == ["hsa"]
    assert judge(arena({"softmax": [0.5] * 3, "hsa": [0.5, 0.6]}), RECALL)["equal"] == []


def test_sentences():
    (sentence,) = choose(arena(VALUES))
    assert "softmax has 0.510 (0.500 to 0.520)" in sentence
    assert "Better: hsa +0.103 (+0.089 to +0.118)" in sentence
    assert "Worse: window -0.097 (-0.111 to -0.082)" in sentence
    assert "No difference is shown: lssa" in sentence
    assert "Better on some seeds only, which is inconclusive: dma" in sentence


def test_one_seed_claims_nothing():
    first, second = choose(arena({"softmax": [0.5], "hsa": [0.9]}, seeds=1))
    assert "no mixer is called better or worse" in first
    assert "the best are hsa, softmax, in this order" in second
    assert choose(arena({}, seeds=3)) == []


def test_efficiency_length_is_left_out_where_a_mixer_is_not_cheaper():
    tokens = [100, 200, 300, 400]
    found = arena({})
    found.mixers.extend(["softmax", "hsa", "dma"])
    costs = {"softmax": lambda n: n * n, "hsa": lambda n: 200 * n, "dma": lambda n: 500 * n}
    for mixer, cost in costs.items():
        for n in tokens:
            for measure, value in (("ms", cost(n)), ("ms of softmax", n * n)):
                found.rows.append(Row("cost", mixer, 0, measure, f"N={n}", value, "", "cpu", 1, "", "", 0.0))
    assert found.efficiency_length("hsa", "ms") == pytest.approx(200)
    assert found.efficiency_length("dma", "ms") != found.efficiency_length("dma", "ms")  # NaN
