"""Recall on grids: where pairs and queries stand, which value is asked for, and the authors' data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.arena import recall
from visionattn.arena.plan import Plan
from visionattn.errors import InputError

GOLDEN = Path(__file__).parents[3] / "shared/dossiers/golden/mqar.npz"
CPU = torch.device("cpu")


@pytest.mark.parametrize("distance", [None, 1, 4, 7])
def test_pairs_and_queries_stand_in_different_cells(distance):
    pairs, queries = recall.place(20, 4, (8, 8), torch.Generator().manual_seed(0), distance)
    assert pairs.shape == queries.shape == (20, 4)
    assert all(len(set(row.tolist())) == 8 for row in torch.cat([pairs, queries], dim=1))
    if distance is not None:
        apart = torch.maximum((pairs // 8 - queries // 8).abs(), (pairs % 8 - queries % 8).abs())
        assert (apart == distance).all()


def test_grids_without_room():
    generator = torch.Generator()
    with pytest.raises(InputError, match="4 x 4 is too small for 9 pairs"):
        recall.place(1, 9, (4, 4), generator)
    with pytest.raises(InputError, match="from 1 to 3 on a grid of 4 x 4"):
        recall.place(1, 1, (4, 4), generator, 4)


def test_the_value_asked_for_is_that_of_the_key():
    tables = recall.draw_tables(CPU)
    x, pairs, queries, values = recall.tokens(tables, 6, 8, (8, 8), 0)
    keys, contents = x.split(recall.WIDTH, dim=2)
    for sample in range(6):
        for query, value in zip(queries[sample], values[sample]):
            same = (keys[sample, pairs[sample]] == keys[sample, query]).all(dim=1)
            assert same.sum() == 1
            assert torch.equal(contents[sample, pairs[sample][same]][0], tables.values[value])
    assert (contents.gather(1, queries[..., None].expand(-1, -1, recall.WIDTH)) == 0).all()
    assert ((x != 0).any(dim=2).sum(dim=1) == 16).all()
    x, queries, values = recall.symbol_cells(6, 8, (8, 8), 0)
    for sample in range(6):
        held = {int(key): int(value) for key, value in x[sample] if value}
        assert [held[int(x[sample, query, 0])] - 1 for query in queries[sample]] == values[sample].tolist()


@pytest.mark.skipif(not GOLDEN.exists(), reason="the authors' numbers are not here")
def test_the_closed_form_solves_the_authors_data():
    golden = np.load(GOLDEN)
    table, x = torch.from_numpy(golden["table"]), torch.from_numpy(golden["inputs"])
    targets = torch.from_numpy(golden["targets"])
    keys, values = x.split(8, dim=2)
    attention = (4 * keys[:, 5:] @ keys[:, :5].mT).softmax(dim=2)
    assert recall.accuracy(attention @ values[:, :5] @ table[16:].T, targets) == pytest.approx(29 / 30)


def test_an_exact_lookup_recalls_everything_and_no_mixing_guesses():
    tables = recall.draw_tables(CPU)
    x, _, queries, values = recall.tokens(tables, 50, 8, (8, 8), 1)
    keys, contents = x.split(recall.WIDTH, dim=2)
    y = (keys @ keys.mT).softmax(dim=2) @ contents
    scores = recall.gather(y, queries) @ tables.values.T
    assert recall.accuracy(scores, values) == 1
    assert recall.accuracy(recall.gather(contents, queries) @ tables.values.T, values) < 0.1


def test_softmax_learns_and_no_mixing_does_not():
    plan = Plan(recall_steps=60, tests=40)
    learned = {name: recall._continuous(name, 0, plan, CPU) for name in ("softmax", "identity")}
    settings = [found.setting for found in learned["softmax"]]
    assert settings == ["K=4", "K=16", "K=32", *(f"r={r}" for r in range(1, 8)), "K=16", "K=64"]
    assert learned["softmax"][0].value > 0.9
    assert learned["identity"][0].value < 0.1


def test_forms_follow_what_is_supported():
    plan = Plan(recall_steps=1, tests=4)
    measures = {name: {found.measure for found in recall.run(name, 0, plan, CPU)} for name in ("mean", "window")}
    assert measures["mean"] - measures["window"] == {"cross recall"}
