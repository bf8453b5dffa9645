"""Predictions of a checkpoint: the likeliest classes, or all probabilities, as CSV and JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from PIL import Image

from visionattn.train.cli import main


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A checkpoint of three classes of grey, and a folder of images to predict, one of them broken."""
    folder = tmp_path_factory.mktemp("predict")
    for label, name in enumerate(("dark", "middle, or so", "bright")):
        for split, count in (("train", 4), ("val", 2)):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (60 + 70 * label + number,) * 3).save(place / f"{number}.png")
    (folder / "new").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32), (25 * number,) * 3).save(folder / "new" / f"{number}.png")
    (folder / "new" / "3.png").write_bytes(b"no image")
    small = ["--model.name=test_resnet", "--data.image_size=32", "--data.batch_size=4", "--trainer.max_epochs=1"]
    more = [f"--trainer.default_root_dir={folder / 'runs'}", "--trainer.accelerator=cpu", "--data.dataset=folder"]
    assert main(["fit", f"--data.root={folder / 'data'}", *small, *more]) == 0
    (checkpoint,) = (folder / "runs").rglob("best.ckpt")
    return checkpoint, folder / "new"


def predict(best, output, *options):
    command = ["predict", *map(str, best), "--trainer.accelerator=cpu", f"--output={output}"]
    assert main([*command, *options]) == 1  # an image could not be read
    if Path(output).suffix == ".json":
        return json.loads(Path(output).read_text())
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


def test_top_classes_and_all_probabilities_agree(best, tmp_path):
    first = predict(best, tmp_path / "1.csv")
    top = predict(best, tmp_path / "2.csv", "--top=2")
    every = predict(best, tmp_path / "3.csv", "--probabilities")
    nested = predict(best, tmp_path / "4.json", "--top=3")
    mapped = predict(best, tmp_path / "5.json", "--probabilities")
    plain = predict(best, tmp_path / "6.json")
    assert [row["image"] for row in first] == [f"{number}.png" for number in range(9) if number != 3]
    assert list(top[0]) == ["image", "label", "class", "probability", "label_2", "class_2", "probability_2"]
    for one, two, all_, list_, mapping, same in zip(first, top, every, nested, mapped, plain, strict=True):
        assert {key: two[key] for key in one} == one
        shares = {key: float(value) for key, value in all_.items() if key != "image"}
        assert set(shares) == {"dark", "middle, or so", "bright"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        ranked = sorted(shares, key=shares.get, reverse=True)
        assert [entry["class"] for entry in list_["classes"]] == ranked == [one["class"], two["class_2"], ranked[2]]
        assert [entry["probability"] for entry in list_["classes"]] == [shares[name] for name in ranked]
        assert mapping == {"image": one["image"], "probabilities": shares}
        assert same == {**one, "label": int(one["label"]), "probability": float(one["probability"])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top=4"], "--top must be from 1 to 3, the number of classes; got 4."),
        (["--top=0"], "--top must be from 1 to 3"),
        (["--top=2", "--probabilities"], "remove --top"),
        (["--output=x.txt"], ".json"),
    ],
)
def test_wrong_forms_are_one_line(best, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *map(str, best), "--trainer.accelerator=cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_single_image_is_predicted_as_in_its_folder(best, tmp_path):
    checkpoint, folder = best
    rows = predict(best, tmp_path / "all.csv")
    command = ["predict", str(checkpoint), str(folder / "5.png"), "--trainer.accelerator=cpu"]
    assert main([*command, f"--output={tmp_path / 'one.csv'}"]) == 0
    with open(tmp_path / "one.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    (expected,) = (row for row in rows if row["image"] == "5.png")
    assert float(row.pop("probability")) == pytest.approx(float(expected.pop("probability")), abs=1e-5)
    assert row == expected
