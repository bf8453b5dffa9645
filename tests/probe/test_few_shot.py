import math

import pytest
import torch

from tests.probe.arrays import clustered
from visionattn.errors import InputError
from visionattn.probe.few_shot import FewShotResult, few_shot, few_shot_rows
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.report.report import percent
from visionattn.probe.sweep import sweep


def test_few_shot_rows():
    labels = torch.tensor([0, 1] * 20 + [2] * 5)
    for draw in range(3):
        rows = few_shot_rows(labels, per_class=4, draw_seed=draw)
        assert labels[rows].bincount().tolist() == [4, 4, 4]
        assert torch.equal(rows, few_shot_rows(labels, per_class=4, draw_seed=draw))
    assert not torch.equal(rows, few_shot_rows(labels, per_class=4, draw_seed=0))
    assert labels[few_shot_rows(labels, fraction=0.1)].bincount().tolist() == [2, 2, 1]
    for wrong, message in [
        ({}, "Exactly one of"),
        ({"per_class": 3, "fraction": 0.1}, "Exactly one of"),
        ({"per_class": 0}, "got 0"),
        ({"fraction": 1.5}, "got 1.5"),
        ({"per_class": 6}, "Class 2 has 5 training images; 6 are required"),
    ]:
        with pytest.raises(InputError, match=message):
            few_shot_rows(labels, **wrong)


def test_few_shot(tmp_path):
    train, test = clustered(150, noise=4.0), clustered(60, noise=4.0, seed=1)
    heads = [HeadSpec("gap", optimizer="adamw", lr=0.05), HeadSpec("ep_4", optimizer="adamw", lr=0.05)]
    options = {"epochs": 5, "warmup_epochs": 1, "batch_size": 64}
    found = few_shot(train, test, heads, [2, 10, 0.5], draws=4, state=tmp_path, **options)
    assert [(one.pooling, one.size) for one in found] == [
        (name, size) for size in (2, 10, 0.5) for name in ("gap", "ep_4")
    ]
    for one in found:
        assert len(set(one.accuracies)) > 1
        assert 0 < one.interval.low < one.mean < one.interval.high < 1
    rows = few_shot_rows(train.labels, per_class=10, draw_seed=1)
    expected = sweep(train, test, heads, rows=rows, epochs=5, warmup_epochs=1, batch_size=27)
    assert found[2].accuracies[1] == expected.chosen[0].best.accuracy
    assert found[4].mean > found[0].mean
    assert len(list(tmp_path.iterdir())) == 12
    single = few_shot(train, test, heads, [1], draws=1, holdout=0, **options)
    assert math.isnan(single[0].interval.low)


def test_two_draws_are_a_point_without_an_interval():
    result = FewShotResult("gap", "last", 1, [0.22, 0.44])
    assert all(map(math.isnan, result.interval))
    assert percent(result.mean, result.interval) == "33.0"
