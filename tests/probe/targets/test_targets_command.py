"""`visionattn probe --task multilabel` and `--task regression`, from the file of labels to the report."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from visionattn.cli import main
from visionattn.errors import DataError, InputError
from visionattn.metrics.targets import average_precision
from visionattn.probe import apply_head
from visionattn.probe.heads.objectives import MultiLabel, Regression

QUICK = [
    "--random",
    "--device",
    "cpu",
    "--epochs",
    "12",
    "--lrs",
    "0.01,0.03",
    "--heads",
    "gap,ep_8",
    "--batch-size",
    "8",
]
NAME = "va_minimal_vit_nano_patch7_28"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey pictures: `bright` has a bright upper half, `striped` stripes below, and `level` is the mean brightness."""
    root = tmp_path_factory.mktemp("labels")
    random = np.random.default_rng(0)
    classes, numbers = ["file,split,bright,striped,never"], ["file,split,level,noise"]
    for number in range(60):
        bright, striped = random.integers(0, 2, 2)
        picture = random.integers(0, 40, (28, 28)).astype(np.uint8) + np.uint8(random.integers(0, 60))
        picture[:14] += np.uint8(100 * bright)
        picture[14::2] += np.uint8(100 * striped)
        Image.fromarray(picture).save(root / f"{number:02d}.png")
        split = "train" if number < 40 else "test"
        classes.append(f"{number:02d}.png,{split},{bright},{striped},0")
        numbers.append(f"{number:02d}.png,{split},{picture.mean():.3f},{random.normal():.3f}")
    (root / "labels.csv").write_text("\n".join(classes))
    (root / "numbers.csv").write_text("\n".join(numbers))
    return root


def unseen(folder):
    """The test images."""
    return [folder / f"{number:02d}.png" for number in range(40, 60)]


def table(file, images):
    """Labels or numbers of images, (n, K)."""
    with file.open() as rows:
        found = {row["file"]: [float(row[name]) for name in list(row)[2:]] for row in csv.DictReader(rows)}
    return np.array([found[image.rpartition("/")[2]] for image in images])


def test_several_labels(folder, tmp_path):
    words = ["probe", NAME, "--task", "multilabel", "--data", str(folder), "--output", str(tmp_path), *QUICK]
    assert main(words) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["task"] == "multilabel"
    chosen = {row["head"]: row for row in found["heads"] if row["chosen"]}
    assert list(chosen) == ["gap", "ep_8", "pixels"]
    assert len(found["heads"]) == 6
    assert min(row["average_precision"] for row in chosen.values()) > 0.9
    classes = {row["class"]: row for row in found["classes"]}
    assert classes["never"]["test images"] == 0
    assert classes["never"]["gap average_precision"] is None
    both = [classes[name]["gap average_precision"] for name in ("bright", "striped")]
    assert chosen["gap"]["average_precision"] == pytest.approx(np.mean(both))
    assert "No training image has these classes: never." in found["notes"]
    assert "mAP" in found["summary"]
    page = (tmp_path / "report.html").read_text()
    assert "average precision" in page
    assert "<script" not in page
    with (tmp_path / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["bright", "striped", "never"]
    applied = apply_head(unseen(folder), tmp_path / "heads/gap-layer5.safetensors", device="cpu")
    assert (applied.task, applied.classes) == ("multilabel", ("bright", "striped", "never"))
    assert applied.probabilities.sum(1).max() > 1.2  # of several classes
    truth = table(folder / "labels.csv", applied.images)
    ones = np.ones((1, len(truth)))
    for column, name in enumerate(("bright", "striped")):
        said = applied.probabilities[:, column].double().numpy()
        assert average_precision(said, truth[:, column], ones)[0] == pytest.approx(
            classes[name]["gap average_precision"]
        )


def test_numbers(folder, tmp_path, capsys):
    words = ["probe", NAME, "--task", "regression", "--data", str(folder / "numbers.csv"), "--output", str(tmp_path)]
    assert main([*words, *QUICK]) == 0
    assert "R²" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    targets = {row["class"]: row for row in found["classes"]}
    assert targets["level"]["gap r2"] > 0.8
    assert targets["level"]["gap spearman"] > 0.85
    assert targets["level"]["gap mae"] < 20
    assert targets["noise"]["gap r2"] < 0.3
    head = next(row for row in found["heads"] if row["head"] == "gap" and row["chosen"])
    assert head["mae"] == pytest.approx((targets["level"]["gap mae"] + targets["noise"]["gap mae"]) / 2)
    assert head["r2_low"] <= head["r2"] <= head["r2_high"]
    saved = tmp_path / "heads/gap-layer5.safetensors"
    applied = apply_head(unseen(folder), saved, device="cpu")
    errors = np.abs(applied.probabilities.numpy() - table(folder / "numbers.csv", applied.images)).mean(0)
    assert errors == pytest.approx([targets[name]["gap mae"] for name in ("level", "noise")], rel=1e-4)
    assert "MAE" in saved.with_suffix(".md").read_text()
    output = tmp_path / "numbers.json"
    images = [str(path) for path in unseen(folder)]
    assert main(["predict", *images, "--head", str(saved), "--output", str(output), "--device", "cpu"]) == 0
    first = json.loads(output.read_text())[0]["values"]
    assert first == pytest.approx(dict(zip(applied.classes, applied.probabilities[0].tolist())), rel=1e-4)
    assert "level" in capsys.readouterr().out
    assert main(["predict", *images, "--head", str(saved), "--top", "2", "--output", str(tmp_path / "a.csv")]) == 2
    assert "--top is for heads of classification; " in capsys.readouterr().err
    assert main([*words, *QUICK]) == 0  # the same run may write there again
    assert main([*words, *QUICK, "--seeds", "3"]) == 2


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="For regression, data must be a file of labels or a folder with one; got tu"):
        visionattn.probe(NAME, ([], []), task="regression", random=True)
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    Image.new("L", (28, 28)).save(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text("file,split,age\na.png,train,1\nb.png,test,2\n")
    with pytest.raises(DataError, match="age is 1 in all training images"):
        visionattn.probe(NAME, tmp_path, task="regression", random=True)
    (tmp_path / "labels.csv").write_text("file,split,cat,dog\na.png,train,1,0\nb.png,test,0,1\n")
    with pytest.raises(DataError, match="at least three training images; got 1"):
        visionattn.probe(NAME, tmp_path, task="multilabel", random=True, no_pixels=True, heads=["gap"])


def test_losses():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).double()
    found = MultiLabel().losses(logits, labels)
    share = logits.sigmoid().double()
    expected = -(labels * share.log() + (1 - labels) * (1 - share).log()).mean(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    objective = Regression(torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 2, 2, 2]))
    expected = ((logits * 2 + torch.tensor([1.0, 2, 3, 4]) - labels) / 2).square().mean(2)
    torch.testing.assert_close(objective.losses(logits, labels).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(objective.outputs(logits)[0, 0, 1], 2 * logits[0, 0, 1].double() + 2)
