"""The table of policies: error, accuracy and cost."""

import pytest
import torch

from tests.frozen.toys import images, vit
from visionattn.cost import count_macs
from visionattn.errors import InputError
from visionattn.frozen.plan import Plan
from visionattn.frozen.selection import ALL, best_plan, check_policies, knn_correct, measure_policies
from visionattn.frozen.using import UnderPolicy, using

TILES = {"query_tile": 4, "key_tile": 2}


@pytest.fixture(scope="module")
def table():
    model, x = vit((8, 8), depth=2, sharp=2.0), images(5, (8, 8))
    labels = torch.tensor([0, 0, 1, 1, 1])
    lines = []
    rows = measure_policies(model, [x[:3], x[3:]], labels, ["window", "mass"], [0.5], progress=lines.append, **TILES)
    return model, x, rows, lines


def test_rows(table):
    model, x, rows, lines = table
    names = [(row["policy"], row["tail"]) for row in rows]
    policies = ("strided", "random", "window", "mass")
    assert names == [("dense", False), *((name, tail) for name in policies for tail in (False, True))]
    assert len(lines) == len(rows)
    dense, *others = rows
    assert (dense["error"], dense["attention"], dense["plan"]) == (0, 1, None)
    assert dense["macs"] == count_macs(model, (3, 32, 32))
    for row in (row for row in others if row["policy"] == "window"):
        with torch.no_grad():
            expected = model.forward_features(x)[:, 1:].flatten(1)
            with using(model, row["plan"]):
                found = model.forward_features(x)[:, 1:].flatten(1)
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert row["error"] == pytest.approx(errors.mean().item(), rel=1e-4)
        assert row["error_high"] - row["error"] == pytest.approx(1.96 * errors.std().item() / 5**0.5, rel=1e-3)
        assert row["macs"] == count_macs(UnderPolicy(model, row["plan"]), (3, 32, 32))
        products = 2 * 2 * 65 * 65 * 16
        assert row["attention"] == pytest.approx(1 - (dense["macs"] - row["macs"]) / products)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    by_name = {(row["policy"], row["tail"]): row for row in others}
    assert by_name["mass", True]["error"] < by_name["random", True]["error"]
    assert by_name["mass", True]["attention"] > 1


def test_best_plan_costs_what_the_budget_allows(table):
    _, _, rows, _ = table
    plan = best_plan(rows)
    assert isinstance(plan, Plan)
    assert plan.policy != "mass"
    chosen = next(row for row in rows if row["plan"] is plan)
    others = [row for row in rows[1:] if row["policy"] != "mass" and row["attention"] <= 0.625]
    assert chosen["error"] == min(row["error"] for row in others)


def test_without_labels_every_policy_has_a_row():
    model, x = vit((4, 4), depth=1), images(2, (4, 4))
    rows = measure_policies(model, x, budgets=[0.5], tails=[True], **TILES)
    assert [row["policy"] for row in rows] == [
        "dense",
        "strided",
        "random",
        *(n for n in ALL if n not in ("strided", "random")),
    ]
    assert all(row["accuracy"] is None for row in rows)
    assert all(row["plan"].settings["budget"] == 0.5 for row in rows[1:])


def test_knn():
    angles = torch.tensor([0.0, 0.1, 3.0, 3.2, 0.25])
    vectors = torch.stack([angles.cos(), 100 * angles.sin() + 7], 1)  # channels of other scales
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert knn_correct(vectors, labels, k=1).tolist() == [True, True, True, True, False]
    assert knn_correct(vectors, labels, k=4).tolist() == [True, True, True, True, False]


def test_names_and_budgets():
    assert check_policies("all", [0.1]) == ["strided", "random", *(n for n in ALL if n not in ("strided", "random"))]
    assert check_policies("tree", [1]) == ["strided", "random", "tree"]
    with pytest.raises(InputError, match=r"policy must be 'all' or some of strided, .*; got \['best'\]"):
        check_policies(["tree", "best"], [0.1])
    with pytest.raises(InputError, match=r"budget must be in \(0, 1\]; got 0"):
        check_policies("tree", [0.5, 0])
    with pytest.raises(InputError, match=r"budget must be one or more numbers in \(0, 1\]; got none"):
        check_policies("tree", [])
    with pytest.raises(InputError, match="as many labels, are required; got 2 and 3"):
        measure_policies(vit(), images(), torch.zeros(3, dtype=torch.int64), "tree")
    with pytest.raises(InputError, match="are required; got 0 and 0"):
        measure_policies(vit(), [], None, "tree")
