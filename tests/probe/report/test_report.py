"""The report: its numbers are those of the heads, each with its interval, and its heads open again."""

import csv
import json
import math
import xml.dom.minidom
from dataclasses import replace

import pytest
import torch

from tests.probe.arrays import clustered
from visionattn.errors import CheckpointError
from visionattn.probe.few_shot import few_shot
from visionattn.probe.heads.banks import grid, head_tokens
from visionattn.probe.knn import nearest_neighbours
from visionattn.probe.report.rendering import draw_curves, write_report
from visionattn.probe.report.report import LayerNeighbours, Report, load_head
from visionattn.probe.report.sections import CurvePoint, make_sections
from visionattn.probe.statistics import Interval, mcnemar_test
from visionattn.probe.sweep import sweep

TRAIN, TEST = clustered(120, layers=2, noise=4.0), clustered(60, layers=2, seed=1, noise=4.0)


@pytest.fixture(scope="module")
def report():
    specs = grid(["cls", "gap", "ep_4"], [0, 1], ["adamw"], [0.01, 0.05], seeds=[0, 1])
    found = sweep(TRAIN, TEST, specs, epochs=2, batch_size=36, warmup_epochs=0)
    neighbours = [
        LayerNeighbours(layer, "mean", nearest_neighbours(TRAIN, TEST, layer, "mean", ks=[3, 5])) for layer in (0, 1)
    ]
    few = few_shot(TRAIN, TEST, specs[:1], [2, 0.1], 4, epochs=2, warmup_epochs=0, holdout=0.0)
    return Report(
        command="visionattn probe net --dataset points",
        backbone={"name": "net", "weights": "random", "license": "none", "sha256": 64 * "0", "parameters": 7},
        data={"dataset": "points", "root": None, "train_images": 120, "test_images": 60, "transform": "<none>"},
        protocol={"optimizer": "adamw"},
        versions={"visionattn": "1"},
        layers=TRAIN.layers,
        indices=[3, 7],
        classes=TRAIN.classes,
        held_out=12,
        sweep=found,
        neighbours=neighbours,
        few_shot=few,
        seconds={"heads": found.seconds},
        notes=["a | b"],
    )


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_report(report, path)
    return path


def test_json_and_csv_agree(folder, report):
    rows = json.loads((folder / "results.json").read_text())["heads"]
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(rows) == len(table) == 24 + 2 * 2 * 3
    for row, line in zip(rows, table):
        assert {key: "" if value is None else str(value) for key, value in row.items()} == line


def test_every_accuracy_lies_in_its_interval(folder):
    content = json.loads((folder / "results.json").read_text())
    for row in content["heads"]:
        for value, low, high in (
            ("test_best", "test_best_low", "test_best_high"),
            ("test_last", "test_last_low", "test_last_high"),
            ("held_out_accuracy", "held_out_low", "held_out_high"),
            ("nll", "nll_low", "nll_high"),
        ):
            if row[value] is not None and (value != "nll" or row["chosen"]):
                assert row[low] <= row[value] <= row[high]
                assert row[low] < row[high]
    for entry in content["few_shot"]:
        assert entry["low"] <= entry["mean"] <= entry["high"]
        assert entry["mean"] == pytest.approx(sum(entry["accuracies"]) / 4)
    for test in content["tests"]:
        assert test["interval"][0] <= test["difference"] <= test["interval"][1]


def test_the_best_probing_head_is_tested_against_all_others(report):
    reference = report.reference()
    probing = [result for result in report.sweep.chosen if result.spec.pooling == "ep_4"]
    assert reference.held_out_accuracy == max(result.held_out_accuracy for result in probing)
    tests = {test.other: test for test in report.tests()}
    assert len(tests) == 3
    other = next(result for result in report.best() if result.spec.pooling == "gap")
    test = tests[f"gap at {other.layer}"]
    assert test.difference == pytest.approx(reference.best.accuracy - other.best.accuracy)
    assert test.p == mcnemar_test(reference.best.correct.numpy(), other.best.correct.numpy())
    # Holm: the smallest p times 3, the next times 2, the last as it is, never falling.
    ordered = sorted(tests.values(), key=lambda one: one.p)
    raised = [min(1.0, (3 - place) * one.p) for place, one in enumerate(ordered)]
    assert [one.p_holm for one in ordered] == [max(raised[: place + 1]) for place in range(3)]


def test_a_head_opens_as_it_was(folder, report):
    for result in report.sweep.chosen:
        head = load_head(folder / "heads" / f"{result.spec.pooling}-layer{[3, 7][result.spec.layer]}.safetensors")
        assert not head.training
        given = head_tokens(next(TEST.batches(torch.arange(60), 60))[1][result.spec.layer], head.pooling.tokens)
        with torch.no_grad():
            logits = head(given)
            torch.testing.assert_close(logits, result.head(given), rtol=0, atol=0)
        assert logits.argmax(1).tolist() == result.best.predictions.tolist()


def test_a_head_has_its_card(folder, report):
    result = report.best()[0]
    card = (folder / "heads" / f"{result.spec.pooling}-layer{[3, 7][result.spec.layer]}.md").read_text()
    for fact in (report.command, 64 * "0", result.layer, f"{100 * result.best.accuracy:.1f} [", "points"):
        assert fact in card


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_other_files_are_no_heads(tmp_path, content):
    file = tmp_path / "head.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not a head written by|There is no file"):
        load_head(file)


def test_what_an_earlier_report_left_is_removed_and_nothing_else(report, tmp_path):
    (tmp_path / "heads").mkdir()
    (tmp_path / "maps").mkdir()
    old = [tmp_path / name for name in ("heads/aim-layer3.safetensors", "heads/aim-layer3.md", "maps/000001.jpg")]
    own = tmp_path / "heads" / "notes.md"
    for path in (*old, own):
        path.write_text("old")
    write_report(report, tmp_path)
    assert [path.exists() for path in (*old, own)] == [False, False, False, True]
    assert len(list((tmp_path / "heads").glob("*.safetensors"))) == 6


def test_both_reports_say_the_same_and_escape_what_they_are_given(folder):
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "&lt;none&gt;" in page
    assert "<none>" not in page
    for section in ("Heads", "Results by layer", "Few training images", "Notes", "Reproduction"):
        assert f"## {section}\n" in markdown
        assert f"<h2>{section}</h2>" in page
    assert page.count("<svg") == 2
    for file in ("layers.svg", "few_shot.svg"):
        assert (folder / file).read_text() in page
        assert f"]({file})" in markdown


def test_reports_of_transformers_on_folders_link_inspect(report):
    layers = tuple(replace(layer, name=f"blocks.{number}") for number, layer in enumerate(report.layers))
    seen = replace(report, layers=layers, data={**report.data, "root": "my photos"})
    assert make_sections(seen)[-1].words[-1] == "`visionattn inspect net --images 'my photos'`"
    seen = replace(seen, command="visionattn probe net --checkpoint a.pth --data 'my photos'")
    assert make_sections(seen)[-1].words[-1] == "`visionattn inspect net --checkpoint a.pth --images 'my photos'`"
    assert not any("inspect" in words for words in make_sections(replace(seen, layers=report.layers))[-1].words)


def test_curves_put_points_where_their_values_are():
    series = {"a": [CurvePoint(0, 0.5, Interval(0.4, 0.6)), CurvePoint(1, 0.9, Interval(math.nan, math.nan))]}
    svg = draw_curves(["<first>", "second"], series, "accuracy, %")
    drawn = xml.dom.minidom.parseString(svg)
    places = [float(circle.getAttribute("cy")) for circle in drawn.getElementsByTagName("circle")]
    texts = {
        text.firstChild.data: float(text.getAttribute("y"))
        for text in drawn.getElementsByTagName("text")
        if text.firstChild.data.isdigit()
    }
    assert places == pytest.approx([texts["50"] - 4, texts["90"] - 4], abs=0.11)
    bars = [line for line in drawn.getElementsByTagName("line") if line.getAttribute("stroke") != "#ddd"]
    ends = [(float(bar.getAttribute("y1")), float(bar.getAttribute("y2"))) for bar in bars]
    assert ends == [pytest.approx((texts["40"] - 4, texts["60"] - 4), abs=0.11)]
    assert "&lt;first&gt;" in svg


def test_curves_leave_out_heads_that_diverged():
    nothing = Interval(math.nan, math.nan)
    svg = draw_curves(["first"], {"a": [CurvePoint(0, math.nan, nothing)]}, "accuracy, %")
    assert "nan" not in svg
    assert "<circle" not in svg
