"""`visionattn.probe` as a function: kinds of input, and what the command does with the same settings."""

import argparse
import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import visionattn
import visionattn.probe.cli
from tests.probe.runs import NAME, TINY, pictures, table, tiny
from visionattn.checkpoints import create
from visionattn.cli import main
from visionattn.errors import DataError, InputError
from visionattn.probe import ProbeSettings

SETTINGS = ProbeSettings(heads=["gap"], lrs=[0.1], epochs=2, few_shot=(), maps=0, device="cpu")
QUICK = {"settings": SETTINGS, "progress": False}


def scores(report):
    keys = ("method", "pooling", "standardized", "held_out_accuracy", "test_best", "nll")
    return [{key: row[key] for key in keys if key in row} for row in report.records()]


def pairs(root):
    """Images of folders as training and test arrays, in the order of the folders."""
    found = []
    for part in ("train", "test"):
        files = sorted((root / part).rglob("*.png"), key=lambda file: (file.parent.name, int(file.stem)))
        found.append([(Image.open(file), int(file.parent.name == "one")) for file in files])
    return found


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return create(NAME)


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A folder whose parts are given, so that none is held out."""
    root = tmp_path_factory.mktemp("validated")
    pictures(root, {"train": {"none": 8, "one": 8}, "val": {"none": 4, "one": 4}})
    (root / "val").rename(root / "test")
    return root


@pytest.fixture(scope="module")
def given(validated, net):
    return visionattn.probe(net, pairs(validated), **QUICK)


def test_the_function_does_what_the_command_does(images, done, tmp_path):
    report = visionattn.probe(NAME, images, random=True, output=tmp_path / "out", **QUICK)
    assert table(tmp_path / "out") == table(done)
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "out", done))
    for entry in (ours, theirs):
        entry["command"] = entry["command"].replace(str(tmp_path / "out"), "OUT").replace(str(done), "OUT")
        for key in ("seconds", "heads"):
            entry.pop(key)
    assert ours == theirs
    assert report.folder == tmp_path / "out"
    assert main(tiny(images, tmp_path / "out")) == 0  # the same run


def test_without_output_nothing_is_written(images, done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = visionattn.probe(NAME, str(images), random=True, **QUICK)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert report.folder is None
    assert report.summary() == json.loads((done / "results.json").read_text())["summary"]
    assert repr(report).startswith(f"Report({NAME} on folder: ")
    assert "<td>k-NN mean</td>" in report._repr_html_()
    with pytest.raises(InputError, match="set output"):
        visionattn.probe(NAME, str(images), random=True, export="gap", **QUICK)


def test_a_module_stays_as_it_is(given, net):
    assert given.backbone["name"] == type(net).__name__
    assert given.backbone["weights"] == "as given"
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_arrays_datasets_and_tensors_give_the_same(given, validated, net):
    train, test = pairs(validated)
    arrays = [
        (np.stack([np.asarray(image) for image, _ in part]), np.array([label for _, label in part]))
        for part in (train, test)
    ]
    tensors = [TensorDataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels)) for images, labels in arrays]
    mean, std = net.pretrained_cfg["mean"][0], net.pretrained_cfg["std"][0]
    normalised = [
        TensorDataset((torch.from_numpy(images)[:, None] / 255 - mean) / std, torch.from_numpy(labels))
        for images, labels in arrays
    ]
    assert (given.data["train_images"], given.data["test_images"]) == (16, 8)
    assert scores(visionattn.probe(net, tuple(arrays), **QUICK)) == scores(given)
    assert scores(visionattn.probe(net, tensors, **QUICK)) == scores(given)
    for row, other in zip(scores(visionattn.probe(net, normalised, **QUICK)), scores(given), strict=True):
        assert row["test_best"] == other["test_best"]


def test_given_images_go_on_where_they_are_the_same(validated, net, tmp_path, monkeypatch):
    train, test = pairs(validated)
    first = visionattn.probe(net, (train, test), output=tmp_path / "out", **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr("visionattn.probe.tokens.features._compute", None)
        assert scores(visionattn.probe(net, (train, test), output=tmp_path / "out", **QUICK)) == scores(first)
    with pytest.raises(InputError, match="contains the report of another run"):
        visionattn.probe(net, (train[1:], test), output=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "the training and the test images .* got int"),
        ((3, 4), "a dataset of .image, label.; got int"),
        (((np.zeros((2, 28, 28), np.uint8), [0]),) * 2, "same length; got 2 and 1"),
        (([(np.zeros((28, 28)), 0)],) * 2, r"uint8 arrays .* got \(28, 28\) of float64"),
        (([(np.zeros((28, 28), np.uint8), -1)],) * 2, "Labels must be whole numbers from 0; got -1"),
        (([np.zeros((28, 28), np.uint8)],) * 2, "must return .image, label.; got ndarray"),
        (([(np.zeros((28, 28), np.uint8), 0)],) * 2, "only one class"),
        (([(torch.zeros(1, 32, 32), 0), (torch.zeros(1, 32, 32), 1)],) * 2, r"must have shape \(1, 28, 28\)"),
    ],
)
def test_images_of_other_kinds_are_refused(net, data, message):
    with pytest.raises((DataError, InputError), match=message):
        visionattn.probe(net, data, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1; got 0"),
        ({"image_size": 4096}, "image_size must be a whole number from 1 to 2048; got 4096"),
        ({"dtype": "fp16"}, "dtype must be one of 'float16', 'bfloat16', 'float32', 'int8'; got 'fp16'"),
        ({"lrs": [0.1, float("nan")]}, "lrs must be finite numbers above 0; got nan"),
        ({"few_shot": [1.5]}, "few_shot must be whole numbers of at least 1, or fractions"),
        ({"layers": "first"}, "layers must be 'last', 'all' or indices; got 'first'"),
        ({"seeds": []}, "at least one number"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        ProbeSettings(**options)


def test_options_and_settings_are_the_same():
    parser = argparse.ArgumentParser()
    visionattn.probe.cli.add_arguments(parser)
    args = vars(parser.parse_args([NAME, "--data", "digits"]))
    assert [args.pop("backbone"), args.pop("data"), args.pop("compare")] == [[NAME], "digits", None]
    assert args.pop("embed") is None
    assert ProbeSettings(**args) == ProbeSettings()
    assert set(args) == {entry.name for entry in fields(ProbeSettings)}


def test_old_spellings_of_options_work(images, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["probe", NAME, "--random", "--dataset", "folder", "--root", str(images), "--precision", "fp16"]
    assert main([*words, *TINY, "--output", str(out)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "visionattn: note: --dataset is now --data.",
        "visionattn: note: --precision is now --dtype float16.",
    ]
    assert main(tiny(images, out)) == 0  # the same run
    assert f"--data={images}" in json.loads((out / "results.json").read_text())["command"]
