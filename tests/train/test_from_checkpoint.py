"""A checkpoint is enough: test, predict, load and export say and do what training did."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning")

from lightning.pytorch import LightningDataModule
from PIL import Image
from torchvision.transforms import v2

from visionattn.checkpoints import load, read_card
from visionattn.data.classify.transforms import fit
from visionattn.errors import CheckpointError, ConfigError
from visionattn.export.spec import ExportSpec
from visionattn.train.cli import main
from visionattn.train.from_checkpoint import expand_positionals, said_by_checkpoint, trusted_class, without_sources

MEAN, STD, SIDE, NAMES = [0.31, 0.42, 0.23], [0.2, 0.3, 0.4], 42, ("cat", "dog", "emu")
RECIPE = f"""
model:
  name: va_minimal_vit_nano_patch7_28
  model_args: {{depth: 1, embed_dim: 32, num_heads: 2, img_size: {SIDE}}}
  in_chans: 3
  lr: 0.01
data:
  dataset: folder
  root: pictures
  batch_size: 6
  mean: {MEAN}
  std: {STD}
trainer: {{accelerator: cpu, max_epochs: 1, enable_progress_bar: false}}
"""
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run in its folder: the checkpoint and the accuracy and loss that the command told."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 5)):
        for name, colour in zip(NAMES, ((180, 90, 60), (60, 150, 90), (80, 80, 170))):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + generator.integers(-90, 90, (40, 52, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / split / name / f"{number}.png")
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "small.yaml"]) == 0
    return folder


@pytest.fixture
def checkpoint(run, monkeypatch):
    monkeypatch.chdir(run)
    return "runs/small/version_0/checkpoints/best.ckpt"


def told(output, measure):
    (row,) = [line for line in output.splitlines() if re.match(rf"│ {measure} +│", line)]
    return re.findall(r"[\d.,]+", row)[-1]


def probabilities(model):
    """Of the validation images, prepared by what the model says and nothing else."""
    config = model.pretrained_cfg
    resize = v2.Compose(
        fit(config["input_size"][1:], v2.InterpolationMode(config["interpolation"]), config["crop_pct"])
    )
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = {}
    for path in sorted(Path("pictures/val").rglob("*.png")):
        image = np.array(resize(Image.open(path)))
        x = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std
        found[str(path.relative_to("pictures/val"))] = model(x[None]).softmax(-1)[0]
    return found


def test_the_path_alone_tests_as_training_did(checkpoint, capsys):
    assert main(["validate", "--config", "runs/small/version_0/config.yaml", "--ckpt_path", checkpoint, QUIET]) == 0
    expected = capsys.readouterr().out
    assert main(["test", checkpoint, QUIET]) == 0
    found = capsys.readouterr().out
    assert [told(found, key) for key in ("loss", "accuracy")] == [told(expected, key) for key in ("loss", "accuracy")]


def test_load_knows_images_and_classes(checkpoint, capsys):
    model = load(checkpoint)
    config = model.pretrained_cfg
    assert (config["input_size"], config["mean"], config["std"]) == ((3, SIDE, SIDE), tuple(MEAN), tuple(STD))
    found = probabilities(model)
    right = [probability.argmax() == NAMES.index(name.split("/")[0]) for name, probability in found.items()]
    assert main(["test", checkpoint, QUIET]) == 0
    assert told(capsys.readouterr().out, "accuracy") == f"{np.mean(right):.4f}"
    spec = ExportSpec.of(model, None, None, 20, "file", None)
    assert (spec.input_size, spec.mean, spec.std) == ([3, SIDE, SIDE], MEAN, STD)
    assert (spec.labels, spec.crop_pct, spec.crop_mode) == (list(NAMES), 1.0, "center")


@pytest.mark.parametrize("form", ["short", "long"])
def test_predict_takes_the_folder_and_the_checkpoint_s_settings(checkpoint, tmp_path, form):
    where = ["--trainer.default_root_dir", str(tmp_path), QUIET]
    named = {"short": [checkpoint, "pictures/val"], "long": ["--ckpt_path", checkpoint, "--data.root", "pictures/val"]}
    assert main(["predict", *named[form], *where]) == 0
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    expected = probabilities(load(checkpoint))
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert row["class"] == NAMES[expected[name].argmax()]
        assert float(row["probability"]) == pytest.approx(expected[name].max().item(), abs=2e-6)


def test_a_model_trained_on_the_digits_predicts_a_folder(checkpoint, tmp_path):
    args = ["--model.model_args={depth: 1, embed_dim: 32, num_heads: 2}", "--trainer.limit_train_batches=1"]
    args += ["--trainer.limit_val_batches=1", "--trainer.max_epochs=1", f"--best.dirpath={tmp_path}", QUIET]
    assert main(["fit", *args, "--trainer.accelerator=cpu"]) == 0
    where = ["--trainer.default_root_dir", str(tmp_path), QUIET]
    assert main(["predict", str(tmp_path / "best.ckpt"), "pictures/val", *where]) == 0
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert {row["class"] for row in rows} <= set("0123456789")


def test_training_goes_on_with_the_configuration_of_its_run(checkpoint, capsys):
    assert main(["fit", "--ckpt_path", checkpoint]) == 2
    assert re.search(r"add --config \S+/version_0/config.yaml", capsys.readouterr().err)


def test_positionals():
    assert expand_positionals(["predict", "a.ckpt", "b", "--x=1"]) == [
        "predict",
        "--ckpt_path=a.ckpt",
        "--data.root=b",
        "--x=1",
    ]
    assert expand_positionals(["fit", "--checkpoint", "a.ckpt"]) == ["fit", "--ckpt_path", "a.ckpt"]
    assert expand_positionals(["test", "--checkpoint=a.ckpt"]) == ["test", "--ckpt_path=a.ckpt"]
    assert expand_positionals(["test", "a.ckpt"]) == ["test", "--ckpt_path=a.ckpt"]
    assert expand_positionals(["fit", "a.ckpt"]) == ["fit", "a.ckpt"]
    assert expand_positionals(["fit", "x", "b", "--y=1"]) == ["fit", "--config=x", "--data.root=b", "--y=1"]
    assert expand_positionals(["fit", "."]) == ["fit", "--data.root=."]
    assert expand_positionals(["test", "--config", "a.yaml"]) == ["test", "--config", "a.yaml"]


def change(checkpoint, path, **entries):
    content = torch.load(checkpoint, weights_only=True)
    for key, values in entries.items():
        if isinstance(values, dict):
            content[key] = {**content[key], **values}
        else:
            content[key] = values
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hyper_parameters": {"_class_path": "os.system"}}, "names the class 'os.system', which is not part of"),
        ({"hyper_parameters": {"_class_path": "visionattn.train.no.Task"}}, "which is not part of visionattn"),
        ({"hyper_parameters": {"_class_path": "visionattn.files.Path"}}, "which is not part of visionattn"),
        ({"hyper_parameters": {"_class_path": 3}}, "names the class '3'"),
        ({"datamodule_hyper_parameters": {"_class_path": "a.B"}}, "names the class 'a.B'"),
        ({"datamodule_hyper_parameters": {"root": "pipe:touch x"}}, "names data that is not on this machine, 'pipe:"),
        ({"datamodule_hyper_parameters": {"dataset": "hfds/a/b"}}, "names data that is not on this machine, 'hfds/"),
        ({"hyper_parameters": {"surprise": 1}}, "hyper-parameters that ClassifyTask does not accept: surprise"),
        ({"hyper_parameters": [1]}, "damaged: its hyper_parameters must be a dict, but is a list"),
        ({"epoch": -3}, "damaged: its epoch is -3"),
        ({"state_dict": {"net.head.bias": 3}}, "its weight net.head.bias is not a dense tensor"),
        ({"state_dict": {"net.head.bias": torch.full((3,), torch.nan)}}, "holds NaN or infinite values"),
        ({"pytorch-lightning_version": "new"}, "has no Lightning version"),
        ({"visionattn": {"config": {"mean": "red"}}}, "mean must be finite numbers"),
    ],
)
def test_checkpoints_are_not_trusted(checkpoint, tmp_path, capsys, entries, message):
    path = change(checkpoint, tmp_path / "x.ckpt", **entries)
    capsys.readouterr()
    assert main(["test", path, QUIET]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert len(error) < 1000


def test_a_file_without_the_state_of_loops_can_be_tested(checkpoint, tmp_path):
    assert main(["test", change(checkpoint, tmp_path / "x.ckpt", callbacks={}), QUIET]) == 0
    content = torch.load(checkpoint, weights_only=True)
    content["loops"] = {}
    torch.save(content, tmp_path / "y.ckpt")
    assert main(["test", str(tmp_path / "y.ckpt"), QUIET]) == 0


def test_what_training_began_with_is_not_looked_for_again(checkpoint):
    card = read_card(checkpoint)
    given = {"name": "hf-hub:timm/x", "pretrained": True, "model_args": {"checkpoint_path": "gone.pth", "depth": 1}}
    found = without_sources(given, card)
    assert found["name"] == card.name
    assert found["pretrained"] is False
    assert found["model_args"] == {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "img_size": [SIDE] * 2,
        "global_pool": "token",
    }


def test_the_name_of_its_model_changes_nothing(checkpoint, tmp_path):
    for number, more in enumerate(([], ["--model.name=va_minimal_vit_nano_patch7_28"])):
        output = f"--output={tmp_path / str(number)}.csv"
        assert main(["predict", checkpoint, "pictures/val", output, QUIET, *more]) == 0
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()
    with said_by_checkpoint(["test", f"--ckpt_path={checkpoint}", "--model.name=resnet18"]) as before:
        assert "model" not in yaml.safe_load(Path(before[1]).read_text())


def test_recipes_and_options_come_first(checkpoint):
    with said_by_checkpoint(["test", "--ckpt_path", checkpoint, "--config", "x.yaml"]) as before:
        assert before == []
    with pytest.raises(CheckpointError, match="no checkpoint"), said_by_checkpoint(["test", "--ckpt_path=gone.ckpt"]):
        pass
    with pytest.raises(ConfigError), said_by_checkpoint(["fit", "--ckpt_path", checkpoint]):
        pass


@pytest.mark.parametrize(
    ("class_path", "name"),
    [
        ("visionattn.data.classify.ClassifyData", "ClassifyData"),
        ("visionattn.data.retrieval.RetrieveData", "RetrieveData"),
        ("visionattn.data.restore.RestoreData", "RestoreData"),
        ("visionattn.data.match.MatchData", "MatchData"),
        ("visionattn.data.triplets.TripletData", "TripletData"),
    ],
)
def test_classes_by_the_names_that_old_checkpoints_have(class_path, name):
    assert trusted_class("x.ckpt", class_path, LightningDataModule).__name__ == name
