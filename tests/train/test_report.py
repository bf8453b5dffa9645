"""Results of a classifier, and the report of them, by the commands that write it."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from PIL import Image
from sklearn import metrics

from visionattn.data.samplers import IGNORED
from visionattn.train.cli import main
from visionattn.train.report import draw_confusion, learning_curves
from visionattn.train.results import Judgements

CLASSES = ("<a>", "b", "c", "d", "e", "none here")


@pytest.fixture(scope="module")
def results():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=random)
    logits = torch.randn(200, 6, generator=random) + 2 * torch.eye(6)[labels]
    labels[7] = IGNORED
    judged = Judgements()
    for some in torch.arange(200).split(64):
        judged.update(logits[some].softmax(1), labels[some])
    return judged.results(CLASSES), logits, labels


def test_measures_are_those_of_scikit_learn(results):
    found, logits, labels = results
    kept = labels != IGNORED
    true, predicted = labels[kept].numpy(), logits[kept].argmax(1).numpy()
    assert found.places.tolist() == kept.nonzero()[:, 0].tolist()
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
    present = np.unique(true)
    recalls = metrics.recall_score(true, predicted, labels=present, average=None)
    assert found.balanced_accuracy == pytest.approx(recalls.mean())
    top = metrics.top_k_accuracy_score(true, logits[kept].numpy(), k=3, labels=range(6))
    assert found.summary()["top_3_accuracy"] == pytest.approx(top)
    assert found.confusion.tolist() == metrics.confusion_matrix(true, predicted, labels=range(6)).tolist()
    scores = metrics.precision_recall_fscore_support(true, predicted, labels=range(6), zero_division=0)
    rows = found.per_class()
    for row, *expected in list(zip(rows, *scores))[:5]:
        assert [row[key] for key in ("precision", "recall", "f1", "images")] == pytest.approx(expected)
    # A share of no images is no number, and not the worst of all classes.
    assert (rows[5]["images"], rows[5]["precision"], rows[5]["recall"], rows[5]["f1"]) == (0, 0, None, None)


def test_worst_mistakes_are_wrong_and_the_surest_first(results):
    found, *_ = results
    rows = found.worst(5)
    sure = found.confidences[rows].tolist()
    assert sure == sorted(sure, reverse=True)
    assert (found.predictions[rows] != found.labels[rows]).all()
    right = found.predictions == found.labels
    assert sure[0] == found.confidences[~right].max()


def test_nothing_collected_is_nothing():
    assert Judgements().results(CLASSES) is None


@pytest.mark.parametrize("count", [3, 200])
def test_confusion_pictures_are_dark_on_the_diagonal(tmp_path, count):
    draw_confusion(tmp_path / "m.png", torch.eye(count, dtype=torch.int64), tuple(map(str, range(count))))
    picture = np.asarray(Image.open(tmp_path / "m.png").convert("L"))
    if count == 200:
        assert picture[1, 1] == 0
        assert picture[1, -1] == 255
    else:
        assert picture[-40, -40] < 100 < picture[-40, 160]


def test_learning_curves_have_a_point_for_each_epoch(tmp_path):
    head = "epoch,step,train/loss,val/loss,val/accuracy,train/images_per_second"
    rows = [
        head,
        "0,1,3.0,,,",
        "0,2,1.0,,,",
        "0,2,,1.5,0.5,",
        "0,2,,,,9",
        "1,4,,1.0,0.75,",
        "1,4,,,,9",
        "2,4,,1.5,0.5,",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    accuracy, loss = learning_curves(tmp_path / "metrics.csv")
    assert [(x, y) for x, y, _ in accuracy.curves.series["validation"]] == [(0, 0.5), (1, 0.75)]
    assert accuracy.curves.labels == ["1", "2"]
    assert [(x, y) for x, y, _ in loss.curves.series["training"]] == [(0, 2.0)]
    (tmp_path / "metrics.csv").write_text("epoch,step\n")
    assert learning_curves(tmp_path / "metrics.csv") == []


def paint(folder, count, size=(40, 32)):
    """Classes told by brightness, with noise."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "middle", "bright")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.normal(60 + 70 * label, 30, (*size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fine-tuned run on a folder with a broken test image: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("report")
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        paint(folder / "data" / split, count)
    (folder / "data/test/dark/0.png").write_bytes(b"no image")
    small = ["--model.name=test_resnet", "--model.pretrained=false", "--data.num_workers=0", "--data.batch_size=6"]
    more = [f"--trainer.default_root_dir={folder / 'runs'}", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    code = main(["fit", "finetune_folder", str(folder / "data"), *small, *more, "--data.image_size=32"])
    assert code == 0
    return folder


def test_fit_writes_a_report_of_the_test_split(run, capsys):
    report = run / "runs/finetune_folder/version_0/report"
    names = {path.name for path in report.iterdir()}
    assert names == {
        *("report.html", "report.md", "results.json", "per_class.csv", "predictions.csv", "accuracy.svg", "loss.svg"),
        *("confusion_matrix.csv", "confusion_matrix.png"),
        *(["mistakes.jpg"] if "mistakes.jpg" in names else []),
    }
    page = (report / "report.html").read_text()
    assert "<script" not in page
    assert all(place.startswith("data:image/") for place in re.findall(r'(?:src|href)="([^"]*)', page))
    assert "Before training, frozen backbone on the validation split (36 training, 18 validation images): k-NN" in page
    content = json.loads((report / "results.json").read_text())
    with (report / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert content["images"] == len(rows) == 17
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert content["accuracy"] == pytest.approx(right / 17)
    assert "dark/0.png" not in {row["image"] for row in rows}
    assert set(content["frozen"]) == {"k-NN", "linear"}
    with (report / "confusion_matrix.csv").open(newline="") as file:
        matrix = {row.pop("class"): list(map(int, row.values())) for row in csv.DictReader(file)}
    assert [sum(counts) for counts in matrix.values()] == [6, 5, 6]  # bright, dark, middle


def test_test_writes_the_same_report_of_a_checkpoint(run, tmp_path, capsys):
    best = str(run / "runs/finetune_folder/version_0/checkpoints/best.ckpt")
    command = ["test", best, str(run / "data"), "--trainer.accelerator=cpu", f"--output={tmp_path / 'out'}"]
    assert main(command) == 0
    assert f"The report is {tmp_path / 'out/report.html'}." in capsys.readouterr().out
    first = json.loads((run / "runs/finetune_folder/version_0/report/results.json").read_text())
    second = json.loads((tmp_path / "out/results.json").read_text())
    assert second["accuracy"] == first["accuracy"]
    assert second["checkpoint"] == best
    assert main(command) == 2
    assert "holds a report: give another folder, or --overwrite." in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
