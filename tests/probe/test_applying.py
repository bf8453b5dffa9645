"""Saved heads on new images: they say what the report says, and know their backbone and their images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import visionattn
from tests.probe.runs import NAME, pictures, tiny
from visionattn.checkpoints import create
from visionattn.cli import main
from visionattn.errors import CheckpointError, DataError, InputError
from visionattn.probe import ProbeSettings, apply_head, open_classifier


@pytest.fixture(scope="module")
def head(done):
    return next((done / "heads").glob("gap-*.safetensors"))


def changed(head, file, **entries):
    """The head with other facts; None leaves an entry out."""
    with safe_open(str(head), "pt") as content:
        facts = json.loads(content.metadata()["visionattn_head"])
        state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    for key, value in entries.items():
        part, _, entry = key.partition("__")
        if value is None:
            del facts[part][entry]
        else:
            facts[part][entry] = value
    save_file(state, str(file), {"visionattn_head": json.dumps(facts)})
    return file


def test_it_says_what_the_report_says(images, done, head):
    applied = apply_head(images / "test", head, device="cpu")
    with (done / "predictions.csv").open() as file:
        reported = {row["image"]: row["gap"] for row in csv.DictReader(file)}
    assert applied.classes == ("none", "one")
    assert {name: entries[0][0] for name, entries in zip(applied.images, applied.top())} == reported
    torch.testing.assert_close(applied.probabilities.sum(1), torch.ones(8))
    (first, second), *_ = applied.top(2)
    assert first[1] >= second[1]
    assert first[1] + second[1] == pytest.approx(1, abs=1e-6)


def test_arrays_and_files_give_the_same(images, head):
    files = sorted((images / "test/one").glob("*.png"))
    arrays = [np.asarray(Image.open(file)) for file in files]
    from_files, from_arrays = apply_head(files, head, device="cpu"), apply_head(arrays, head, device="cpu")
    assert from_arrays.images == ["image 0", "image 1", "image 2", "image 3"]
    torch.testing.assert_close(from_arrays.probabilities, from_files.probabilities, rtol=0, atol=0)
    classifier = open_classifier(head, device="cpu")
    batch = torch.stack([classifier.transform(Image.open(file)) for file in files])
    torch.testing.assert_close(classifier(batch), from_files.probabilities)


def test_the_command_writes_the_most_probable_classes(images, head, tmp_path, capsys):
    words = ["predict", str(images / "test"), "--head", str(head), "--device", "cpu"]
    words += ["--output", str(tmp_path / "p.csv")]
    assert main([*words, "--top", "2"]) == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = ["label", "class", "probability"]
    assert list(rows[0]) == ["image", *columns, *(f"{column}_2" for column in columns)]
    applied = apply_head(images / "test", head, device="cpu")
    for row, name, ((first, share), (second, _)) in zip(rows, applied.images, applied.top(2), strict=True):
        assert (row["image"], row["class"], row["class_2"]) == (name, first, second)
        assert row["label"] == str(applied.classes.index(first))
        assert float(row["probability"]) == pytest.approx(share, abs=1e-6)
    assert "The predictions are in" in capsys.readouterr().out
    assert main(words) == 2  # the file is kept
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_other_forms_of_the_file(images, head, tmp_path, capsys):
    words = ["predict", str(images / "test/one"), "--head", str(head), "--device", "cpu", "--output"]
    applied = apply_head(images / "test/one", head, device="cpu")
    for name, more in {"one": [], "two": ["--top", "2"], "all": ["--probabilities"]}.items():
        assert main([*words, str(tmp_path / f"{name}.json"), *more]) == 0
    one, two, every = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two", "all"))
    for row, first, pair, shares in zip(applied.top(2), one, two, every, strict=True):
        assert first == {"image": first["image"], **pair["classes"][0]}
        assert [entry["class"] for entry in pair["classes"]] == [name for name, _ in row]
        assert shares["probabilities"] == pytest.approx(dict(row), abs=1e-6)
    assert main([*words, str(tmp_path / "all.csv"), "--probabilities"]) == 0
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "none", "one"]
    assert [float(row["one"]) for row in rows] == pytest.approx(applied.probabilities[:, 1].tolist(), abs=1e-6)
    assert main([*words, str(tmp_path / "p.csv"), "--top", "3"]) == 2
    assert "--top must be from 1 to 2, the number of classes; got 3" in capsys.readouterr().err


def test_a_head_finds_its_weight_file_or_says_what_is_missing(images, tmp_path):
    torch.manual_seed(3)
    net = create(NAME)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    assert main(tiny(images, tmp_path / "out", weights=str(tmp_path / "net.pth"))) == 0
    head = next((tmp_path / "out/heads").glob("*.safetensors"))
    found = apply_head(images / "test", head, device="cpu")
    (tmp_path / "net.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth.* --backbone and --checkpoint say where"):
        apply_head(images / "test", head, device="cpu")
    again = apply_head(images / "test", head, backbone=NAME, checkpoint=tmp_path / "moved.pth", device="cpu")
    torch.testing.assert_close(again.probabilities, found.probabilities, rtol=0, atol=0)
    other = {key: value + 1 if value.is_floating_point() else value for key, value in net.state_dict().items()}
    torch.save(other, tmp_path / "moved.pth")
    with pytest.raises(CheckpointError, match=r"was trained on .* with other weights"):
        apply_head(images / "test", head, backbone=NAME, checkpoint=tmp_path / "moved.pth", device="cpu")


def test_the_head_of_a_module_needs_the_module(images, tmp_path):
    torch.manual_seed(0)
    net = create(NAME)
    settings = ProbeSettings(heads=["gap"], lrs=[0.1], epochs=1, few_shot=(), maps=0, device="cpu", output=tmp_path)
    report = visionattn.probe(net, images, settings=settings, progress=False)
    head = next((tmp_path / "heads").glob("*.safetensors"))
    with pytest.raises(InputError, match="was a Python object: pass it again as backbone="):
        apply_head(images / "test", head, device="cpu")
    applied = apply_head(images / "test", head, backbone=net, device="cpu")
    predicted = [applied.classes.index(entries[0][0]) for entries in applied.top()]
    assert predicted == report.best()[0].best.predictions.tolist()


def test_images_that_cannot_be_read_are_listed(head, tmp_path, capsys):
    pictures(tmp_path / "new", {"some": {"one": 12}}, broken=["some/one/broken.png"])
    assert main(["predict", str(tmp_path / "new"), "--head", str(head), "--output", str(tmp_path / "p.csv")]) == 1
    assert "left out: some/one/broken.png" in capsys.readouterr().err
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"data__image_size": None}, "does not state its inputs .the entry dataimage_size is missing."),
        ({"data__image_size": 10**9}, "images of 1000000000 pixels"),
        ({"data__image_size": [28, 28]}, r"images of .28, 28. pixels"),
        ({"data__std": [0.0]}, "an invalid normalisation"),
        ({"data__mean": [0.1, 0.2, 0.3], "data__std": [1, 1, 1]}, "does not match layer"),
        ({"layer__index": 99}, "must be from 0 to 5"),
        ({"backbone__sha256": "0"}, "with other weights"),
        ({"backbone__name": "va_lost"}, "There is no model 'va_lost'"),
        ({"backbone__name": "hf-hub:somebody/model"}, "to allow its download"),
        ({"backbone__checkpoint": 3}, "does not state its inputs"),
    ],
)
def test_a_file_that_somebody_made_is_not_trusted(images, head, tmp_path, entries, message):
    file = changed(head, tmp_path / "head.safetensors", **entries)
    with pytest.raises((CheckpointError, InputError, LookupError), match=message):
        apply_head(images / "test", file, device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "lost", "--head", "{head}"], "There is no file or folder lost"),
        (["predict", ".", "--head", "{head}"], "There are no images in ."),
        (["predict", ".", "--head", "lost.safetensors"], "There is no file lost.safetensors"),
        (["predict", "--head={head}"], "required: IMAGE|FOLDER"),
        (["predict", ".", "--head", "{head}", "--top", "0"], "must be a whole number of at least 1; got '0'"),
        (["predict", ".", "--head", "{head}", "--output", "p.txt"], ".csv"),
        (["predict", ".", "--head", "{head}", "--top", "2", "--probabilities"], "not allowed with"),
        (["predict", ".", "--head", "{head}", "--color"], "--color is for heads of segmentation; "),
        (["predict", ".", "--head", "{head}", "--skip-existing"], "--skip-existing is for heads of segmentation; "),
    ],
)
def test_mistakes_of_the_command(head, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(head=head) for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_images_are_a_mistake(head):
    with pytest.raises(DataError, match="There are no images"):
        apply_head([], head, device="cpu")
