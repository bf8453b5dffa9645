"""The whole arena: files, controls, going on, damaged state, mistakes."""

import csv
from dataclasses import replace
from functools import partial

import pytest

import visionattn
from visionattn.arena import accuracy, api, recall
from visionattn.arena.plan import Plan
from visionattn.arena.report import front
from visionattn.errors import InputError, UnknownNameError

arena = partial(visionattn.arena, processes=1)  # what tests replace is not replaced in other processes
TINY = Plan(1, 1, epochs=1, tests=4, sequences=8, rounds=1, sides=(2, 3, 4), seeds=2)


@pytest.fixture
def tiny(monkeypatch):
    digits = accuracy.read_images(None)
    few = digits._replace(**{name: getattr(digits, name)[:64] for name in digits._fields[:4]})
    monkeypatch.setattr(api, "FULL", TINY)
    monkeypatch.setattr(accuracy, "read_images", lambda folder: few)


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything(tiny, tmp_path):
    found = arena(["hsa"], output=tmp_path)
    assert found.mixers == ["softmax", "identity", "mean", "random_qk", "hsa"]
    written = rows(tmp_path)
    assert {(row["task"], row["mixer"]) for row in written} == {(t, m) for t in api.TASKS for m in found.mixers}
    assert {row["seed"] for row in written if row["task"] == "recall"} == {"0", "1"}
    assert {row["visionattn"] for row in written} == {visionattn.__version__}
    page = (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("<svg") == page.count(".svg)")
    for heading in ("Which mixer when", "Tasks", "Costs of a layer of ViT-Tiny", "Supported calls", "Notes"):
        assert f"## {heading}" in page
    assert "anchor: ridge" in page
    assert "softmax has" in page
    assert found.table().row_count == 5


def test_it_goes_on_and_repairs(tiny, tmp_path, monkeypatch, capsys):
    run, done = recall.run, []

    def stopped(name, *args):
        if name == "mean":
            raise KeyboardInterrupt
        done.append(name)
        return run(name, *args)

    monkeypatch.setattr(recall, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        arena(["hsa"], ["recall"], seeds=1, output=tmp_path)
    assert done == ["softmax", "identity"]
    monkeypatch.setattr(recall, "run", lambda *args: (done.append(args[0]), run(*args))[1])
    arena(["hsa"], ["recall"], seeds=1, output=tmp_path)
    assert done == ["softmax", "identity", "mean", "random_qk", "hsa"]
    before = (tmp_path / "results.csv").read_bytes()
    arena(["hsa"], ["recall"], seeds=1, output=tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == before
    (tmp_path / "results.csv").write_bytes(before.replace(b",mean,", b"", 1)[:-9])
    arena(["hsa"], ["recall"], seeds=1, output=tmp_path)
    assert len(rows(tmp_path)) == before.count(b"\n") - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:5], lines[5][:40], *lines[6:]],
        lambda lines: [*lines[:5], lines[5], *lines[5:]],
        lambda lines: [*lines[:5], '"' + lines[5], *lines[6:]],
        lambda lines: [*lines[:5], "x" * 200_000, *lines[6:]],
        lambda lines: [line.replace("N=4,", "N=four,") for line in lines],
        lambda lines: lines[1:],
        lambda lines: [],
    ],
    ids=["cut", "twice", "quote", "long", "setting", "header", "empty"],
)
def test_a_cell_with_a_damaged_row_is_measured_again(tiny, tmp_path, damage):
    found = arena(["hsa"], ["cost"], 2, output=tmp_path)
    expected = {(row.cell, row.measure, row.setting) for row in found.rows}
    file = tmp_path / "results.csv"
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    repaired = arena("hsa", "cost", [2], output=tmp_path)
    assert {(row.cell, row.measure, row.setting) for row in repaired.rows} == expected
    assert len(repaired.rows) == len(found.rows) == len(rows(tmp_path))


def test_rows_of_other_sizes_stay_and_do_not_count(tiny, tmp_path, monkeypatch):
    arena(["hsa"], ["regression"], seeds=1, output=tmp_path)
    monkeypatch.setattr(api, "FULL", Plan(1, 2, sequences=8, seeds=1))
    found = arena(["hsa"], ["regression"], output=tmp_path)
    assert {row.recipe for row in found.rows} == {"2 steps; 8 sequences"}
    assert {row["recipe"] for row in rows(tmp_path)} == {"1 steps; 8 sequences", "2 steps; 8 sequences"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixers": ["windows"]}, UnknownNameError, "no mixer 'windows': did you mean 'window'"),
        ({"tasks": ["recal"]}, InputError, "must be some of 'cost', .*; got 'recal'"),
        ({"tasks": []}, InputError, "requires at least one task"),
        ({"seeds": 0}, InputError, "seeds of at least 1"),
        ({"grid": [1]}, InputError, "sides of grids from 2 to 512"),
        ({"grid": [14.5]}, InputError, "all integers"),
        ({"grid": ["14"]}, InputError, "all integers"),
        ({"seeds": 1.5}, InputError, "all integers"),
        ({"seeds": "2"}, InputError, "all integers"),
        ({"mixers": "has"}, UnknownNameError, "no mixer 'has': did you mean 'hsa'"),
        ({"processes": 0}, InputError, "processes must be an integer of at least 1; got 0"),
        ({"device": "tpu"}, InputError, "'tpu' cannot be used"),
    ],
)
def test_mistakes(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        arena(**arguments, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_change_nothing_but_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "FULL", Plan(1, 2, sequences=8, seeds=1))
    tables = []
    for processes in (1, 2):
        found = visionattn.arena(["hsa"], ["regression"], output=tmp_path / str(processes), processes=processes)
        tables.append([replace(row, seconds=0.0) for row in found.rows])
    assert tables[0] == tables[1]


def test_front():
    assert front([(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9), (1, 0.5)]) == [True, False, True, False, True]
