"""Backbones side by side: tests on the same images, the front, and what cannot be compared."""

import csv
import html
import json
import re
import shutil
import xml.dom.minidom

import numpy as np
import pytest
import torch
import torchvision

import visionattn
from tests.probe.runs import NAME, TINY
from visionattn.checkpoints import create
from visionattn.cli import main
from visionattn.cost import count_macs
from visionattn.errors import DataError, InputError
from visionattn.probe import Backbone, ProbeSettings, costs
from visionattn.probe.comparison import Comparison, Judged, pareto_front
from visionattn.probe.statistics import mcnemar_test

SETTINGS = ProbeSettings(heads=["gap"], lrs=[0.1], epochs=2, few_shot=(), maps=0, device="cpu", random=True)
OTHER = "va_minimal_vit_micro_patch4_32"


@pytest.fixture(scope="module", autouse=True)
def _short_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "ROUNDS", (2, 2))
        yield


@pytest.fixture(scope="module")
def both(images, tmp_path_factory):
    """Two backbones, probed by one command."""
    path = tmp_path_factory.mktemp("both")
    words = ["probe", NAME, OTHER, "--random", "--data", str(images), *TINY, "--output", str(path)]
    assert main(words) == 0
    return path


@pytest.fixture(scope="module")
def content(both):
    return json.loads((both / "comparison.json").read_text())


def judged(name, plan, digest, *answers):
    data = {"test_digest": digest, "train_digest": "same", "image_size": 8, "dataset": "noise", "root": None}
    backbone = {"weights": "random", "sha256": "0", "macs": 10, "parameters": 3, "bytes": 12}
    correct = {"k-NN mean": answers[0], "gap": answers[1]}
    known = [{"name": method, "held_out_accuracy": 0.5} for method in correct]
    report = {"plan": plan, "data": data, "backbone": backbone, "best": "gap", "answers": known, "command": "probe"}
    return Judged(name, report, correct)


def test_the_front_has_those_that_no_other_beats():
    assert pareto_front([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.9]) == [True, True, False, True]
    assert pareto_front([1, 1, None], [0.5, 0.5, 0.9]) == [True, True, False]
    assert pareto_front([1, 1, 2], [0.5, 0.6, 0.6]) == [False, True, False]


def test_pairs_are_tested_and_corrected_for_their_number():
    random = np.random.default_rng(0)
    right = [random.random(300) < share for share in (0.8, 0.7, 0.5)]
    several = Comparison([judged(name, name, "d", one[::-1], one) for name, one in zip("abc", right)])
    tests = {(test.one, test.other): test for test in several.tests()}
    assert list(tests) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (one, other), test in tests.items():
        first, second = right["abc".index(one)], right["abc".index(other)]
        assert test.p == mcnemar_test(first, second)
        assert test.difference == pytest.approx(first.mean() - second.mean())
        assert test.interval.low < test.difference < test.interval.high
    assert max(test.p_holm for test in tests.values()) >= max(test.p for test in tests.values())
    assert tests["a", "c"].p_holm == pytest.approx(3 * tests["a", "c"].p)
    behind = several.against_leader()
    assert several.leader.name == "a"
    assert behind["c"].difference == pytest.approx(-tests["a", "c"].difference)
    assert behind["c"].interval == (-tests["a", "c"].interval.high, -tests["a", "c"].interval.low)
    assert several.summary().startswith("a is right most often")
    assert [row["front_macs"] for row in several.rows()] == [True, False, False]


def test_what_is_not_of_the_same_images_is_refused():
    right = np.ones(4, bool)
    first = judged("a", "a", "d", right, right)
    with pytest.raises(InputError, match="b and a have different test images"):
        Comparison([first, judged("b", "b", "other", right, right)])
    with pytest.raises(InputError, match="b has another number of readable test images"):
        Comparison([first, judged("b", "b", "d", right[1:], right[1:])])
    with pytest.raises(InputError, match="b is given twice"):
        Comparison([first, judged("b", "a", "d", right, right)])
    with pytest.raises(InputError, match="at least two backbones; got 1"):
        Comparison([first])


def test_one_command_probes_and_compares(both, content):
    names = [row["backbone"] for row in content["backbones"]]
    assert names == [NAME, OTHER]
    assert {path.name for path in both.iterdir()} >= {"comparison.html", "comparison.md", "comparison.csv", *names}
    with (both / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["macs"] for line in lines] == [str(row["macs"]) for row in content["backbones"]]
    for row in content["backbones"]:
        report = json.loads((both / row["backbone"] / "results.json").read_text())
        assert (row["parameters"], row["head"]) == (report["backbone"]["parameters"], report["best"])
        chosen = next(entry for entry in report["answers"] if entry["name"] == row["head"])
        assert row["accuracy"] == chosen["accuracy"]
        assert row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
        assert row["bytes"] >= 4 * row["parameters"]


def test_its_page_needs_no_other_file(both, content):
    page = (both / "comparison.html").read_text()
    assert not re.search(r"<script|<link|href=|url\(|@import|src=", page)
    assert page.count("<svg") == 2
    for name in ("accuracy_macs.svg", "accuracy_ms.svg"):
        points = xml.dom.minidom.parse(str(both / name)).getElementsByTagName("circle")
        assert len(points) == 2
        assert "![Accuracy against" in (both / "comparison.md").read_text()
    assert html.escape(content["summary"]) in page


def test_saved_reports_compare_as_they_did(both, content, tmp_path, capsys):
    folders = [both / row["backbone"] for row in content["backbones"]]
    assert main(["probe", "--compare", *map(str, folders), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "out/comparison.json").read_text())
    for part in ("tests", "tests_neighbours", "methods", "summary", "commands"):
        assert again[part] == content[part]
    assert content["summary"][:60] in capsys.readouterr().out
    found = visionattn.compare([folders[0] / "results.json", folders[1]], device="cpu")
    assert found.folder is None
    assert [test.p for test in found.tests()] == [test["p"] for test in content["tests"]]
    assert "<td>gap</td>" in found._repr_html_()


def test_a_name_among_several_has_its_weight_file(images, tmp_path):
    torch.manual_seed(2)
    torch.save(create(NAME).state_dict(), tmp_path / "net.pth")
    pair = [NAME, f"{NAME}={tmp_path / 'net.pth'}"]
    found = visionattn.probe(pair, images, settings=SETTINGS, progress=False)
    assert [one.report["backbone"]["weights"] for one in found.judged] == ["random", "file net.pth"]
    assert [one.name[: len(NAME) + 2] for one in found.judged] == [f"{NAME} ("] * 2
    assert len({one.name for one in found.judged}) == 2
    assert len(found.timings) == 2


def test_modules_are_compared_in_python(images):
    torch.manual_seed(0)
    nets = [create(NAME), create(OTHER, in_chans=1)]
    found = visionattn.probe(nets, images, settings=SETTINGS, random=False, progress=False)
    assert [one.name.split(" (")[0] for one in found.judged] == [type(net).__name__ for net in nets]
    assert len({one.name for one in found.judged}) == 2
    assert set(found.timings) == {one.name for one in found.judged}  # the given modules were timed


def test_a_comparison_is_not_replaced_unasked(both, content, images, tmp_path):
    shutil.copy(both / "comparison.json", tmp_path)
    first, second = (both / row["backbone"] for row in content["backbones"])
    visionattn.compare([second, first], output=tmp_path, device="cpu")  # the same reports
    (tmp_path / "comparison.json").write_text('{"plan": "other"}')
    with pytest.raises(InputError, match=r"contains a comparison of other reports\. Use --overwrite"):
        visionattn.compare([first, second], output=tmp_path, device="cpu")
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(InputError, match="contains a comparison that cannot be read"):
        visionattn.compare([first, second], output=tmp_path, device="cpu")
    visionattn.compare([first, second], output=tmp_path, overwrite=True, device="cpu")


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "old"])
def test_reports_that_cannot_be_compared_say_what_to_do(both, content, tmp_path, damage):
    first, second = (both / row["backbone"] for row in content["backbones"])
    for name in ("results.json", "predictions.csv"):
        shutil.copy(second / name, tmp_path)
    file = tmp_path / "predictions.csv"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_text(file.read_text()[:-9])
    elif damage == "other":
        file.write_text(file.read_text().replace("gap", "cls"))
    else:
        old = json.loads((tmp_path / "results.json").read_text())
        del old["backbone"]["macs"]
        (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match="Run its command again: `visionattn probe"):
        visionattn.compare([first, tmp_path], device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "lost"], "lost is not the folder of a report"),
        (["--compare", "lost", "--data", "digits"], "--compare accepts only reports"),
        (
            [NAME, OTHER, "--data", "digits", "--checkpoint", "a.pth"],
            "--checkpoint and --export require a single backbone",
        ),
        ([NAME, "va_lost", "--random", "--data", "digits"], "There is no model 'va_lost'"),
        ([NAME, NAME, "--random", "--data", "digits", "--epochs", "1"], "is given twice"),
    ],
)
def test_mistakes_of_the_command(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_reports_of_other_tasks_are_refused(both, tmp_path):
    (tmp_path / "results.json").write_text('{"command": "visionattn probe", "task": "segmentation"}')
    with pytest.raises(InputError, match="is a report of segmentation"):
        visionattn.compare([both / NAME, tmp_path], device="cpu")
    with pytest.raises(InputError, match="can be compared; got 3"):
        visionattn.compare([both / NAME, 3], device="cpu")


def test_backbones_of_all_kinds_are_compared(images):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 6, 7, stride=7)
    function = Backbone.from_callable(lambda x: net(x), image_size=28, mean=(0.5,), std=(0.5,), name="seven")
    vit = torchvision.models.VisionTransformer(28, 7, 1, 2, 24, 48)
    found = visionattn.probe([function, vit, NAME], images, settings=SETTINGS, image_size=28, progress=False)
    assert [one.name for one in found.judged] == ["seven", "VisionTransformer", NAME]
    assert set(found.timings) == {one.name for one in found.judged}
    assert found.judged[0].report["backbone"]["macs"] == 6 * 49 * 16
    assert "class_token" in dict(vit.named_parameters())
    assert vit.heads[0].out_features == 1000  # the module itself stays as it is


def test_costs_are_those_of_the_network():
    for name in (NAME, OTHER):
        net = create(name, num_classes=0)
        backbone = Backbone(net, image_size=net.pretrained_cfg["input_size"][1])
        found = costs.backbone_cost(backbone)
        assert found.macs == count_macs(net, net.pretrained_cfg["input_size"])
        assert found.parameters == sum(parameter.numel() for parameter in net.parameters())
        assert found.bytes == sum(value.nbytes for value in net.state_dict().values())
        (timing,) = costs.time_backbones([backbone])
        assert 0 < timing.low <= timing.median <= timing.high
        assert timing.rounds == 2
