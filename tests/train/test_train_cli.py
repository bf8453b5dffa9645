"""The four commands, their messages and the files they leave."""

from __future__ import annotations

import csv
import importlib.resources
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image

from tests.forking import Fork
from visionattn.errors import ConfigError, UnknownNameError
from visionattn.train.cli import check_averaging, find_recipe, main, recipes

SMALL = """
model:
  model_args: {depth: 1, embed_dim: 32, num_heads: 2, drop_rate: 0.1}
  mixup: 0.2
data:
  batch_size: 256
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A quick recipe in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    return "small.yaml"


def images(folder, names, size=(20, 16), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new(mode, size, number * 9 % 256 if mode == "L" else (number * 9 % 256, 80, 160)).save(folder / name)


def metrics(folder, column):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row[column]) for row in csv.DictReader(file) if row.get(column)]


def shown(output, measure):
    """The last number in a row of the table."""
    (row,) = [line for line in output.splitlines() if re.match(rf"│ {measure} +│", line)]
    return re.findall(r"[\d.,]+", row)[-1]


def test_fit_leaves_a_run_that_the_other_commands_read(small, capsys):
    ema = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]
    assert main(["fit", "--config", small, *ema]) == 0
    output = capsys.readouterr().out
    run = Path("runs/small/version_0").resolve()
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "hparams.yaml", "metrics.csv"]
    assert f"The run is in {run}" in output
    for measure in ("accuracy", "loss", "calibration error", "parameters", "multiply-accumulates", "images/second"):
        assert shown(output, measure)
    assert len(metrics(run, "train/loss")) == 8

    # The averaged weights were tested, not the ones that training goes on with.
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    head = "net.head.weight"
    assert not torch.equal(best["state_dict"][head], best["current_model_state"][head])
    for settings in (["--config", str(run / "config.yaml")], ["--trainer.enable_progress_bar=false"]):
        assert main(["test", *settings, "--ckpt_path", str(run / "checkpoints/best.ckpt")]) == 0
        assert shown(capsys.readouterr().out, "loss") == shown(output, "loss")

    assert main(["predict", "--checkpoint", str(run / "checkpoints/best.ckpt")]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360
    assert rows[0].keys() == {"image", "label", "class", "probability"}
    assert sorted(path.name for path in Path("runs/small").iterdir()) == ["version_0"]


def test_the_configuration_of_a_run_repeats_it(small, monkeypatch):
    kept = []
    monkeypatch.setattr("visionattn.train.cli.keep_freed_memory", lambda: kept.append(True))
    assert main(["fit", "--config", small]) == 0
    assert kept == [True]  # on a CPU
    assert main(["fit", "--config", "runs/small/version_0/config.yaml"]) == 0
    first, second = Path("runs/small/version_0"), Path("runs/small/version_1")
    assert metrics(first, "train/loss") == metrics(second, "train/loss")
    assert metrics(first, "test/loss") == metrics(second, "test/loss")


def test_a_resumed_run_goes_on_in_its_folder(small):
    every_step = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename=step{step}",
        "--trainer.callbacks.auto_insert_metric_name=false",
    ]
    assert main(["fit", "--config", small, *every_step]) == 0
    run = Path("runs/small/version_0")
    columns = ("train/loss", "train/lr", "val/accuracy", "test/loss")
    before = {column: metrics(run, column) for column in columns}
    best = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/step6.ckpt"]) == 0
    assert {column: metrics(run, column) for column in columns} == before
    resumed = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (key,) = [key for key in best if "val/accuracy" in key]
    assert resumed[key]["best_model_score"] == best[key]["best_model_score"]
    assert [path.name for path in Path("runs/small").iterdir()] == ["version_0"]


def start(folder, *args, lines=""):
    """A process of a stand-in for the installed command, which other processes can start again."""
    path = folder / "visionattn_script.py"
    path.write_text(f"import sys\n{lines}\nfrom visionattn.train.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    return Fork(path.read_text(), (str(path), *args))


def test_ctrl_c_gives_the_command_to_go_on_with(small, tmp_path):
    args = ["fit", "--config", small, "--trainer.max_epochs=400", "--trainer.num_sanity_val_steps=0"]
    process = start(tmp_path, *args)
    last = tmp_path / "runs/small/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    done = process.wait(60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    command = done.stderr.strip().splitlines()[-1].split()
    assert command == [
        "visionattn", "fit", "--config", str(last.parent.parent / "config.yaml"), "--checkpoint", str(last)
    ]  # fmt: skip
    steps = torch.load(last, weights_only=True)["global_step"]
    assert main([*command[1:], f"--trainer.max_steps={steps + 2}"]) == 0
    rows = [int(step) for step, _ in metrics(last.parent.parent, "train/loss")]
    assert rows == list(range(steps + 2))


RECORD = """
import os
from visionattn.data import samplers
original = samplers.SeededDataset.__getitem__
def recorded(self, key):
    with open(f"seen-{os.environ.get('LOCAL_RANK', '0')}.txt", "a") as file:
        print(len(self), *map(int, key), file=file)
    return original(self, key)
samplers.SeededDataset.__getitem__ = recorded
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes(small, tmp_path):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=128"]
    args = ["fit", "--config", small, *two, "--last.every_n_train_steps=6", "--trainer.num_sanity_val_steps=0"]
    done = start(tmp_path, *args, lines=RECORD).wait(120)
    assert done.returncode == 0, done.stderr
    lines = [Path(f"seen-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    seen = [[tuple(map(int, line.split())) for line in rank] for rank in lines]
    for epoch in (0, 1):
        parts = [[index for size, index, at, _ in rank if size == 1077 and at == epoch] for rank in seen]
        assert [len(part) for part in parts] == [512, 512]
        assert len(set(parts[0] + parts[1])) == 1024
    validated = Counter(index for rank in seen for size, index, at, _ in rank if size == 360 and at == 0)
    # Evaluation has the samples of epoch 0 each time: all of them after both epochs.
    assert sorted(validated) == list(range(360))
    assert min(validated.values()) >= 2

    run = Path("runs/small/version_0")
    before = {column: metrics(run, column) for column in ("train/loss", "val/loss", "test/loss")}
    assert len(before["train/loss"]) == 8
    states = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["ExactResume"]["ranks"]
    assert len(states) == 2
    resumed = [*args, "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    done = start(tmp_path, *resumed, lines=RECORD).wait(120)
    assert done.returncode == 0, done.stderr
    assert {column: metrics(run, column) for column in before} == before


def fails(capsys, *args):
    """The one message of a command that is refused."""
    assert main([*args, "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    message = captured.err.strip().splitlines()
    assert len(message) == 1, captured.err
    return message[0].removeprefix("visionattn: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.name=va_minimal_vit_nano_patch7_82"], "Did you mean va_minimal_vit_nano_patch7_28"),
        (
            ["--config=minimal_vit_digit"],
            "There is no file or recipe 'minimal_vit_digit'. The recipes are: classify/",
        ),
        (["--model.lrr=1"], "There is no setting model.lrr. Did you mean model.lr"),
        (["--data.batchsize=1"], "There is no setting data.batchsize. Did you mean data.batch_size"),
        (
            ["--trainer.max_epoch_count=1"],
            "There is no setting trainer.max_epoch_count. Did you mean trainer.max_epochs",
        ),
        (["--model.lr=fast"], '"model.lr": Expected a float. Got value: fast'),
        (["--model.opt=adamq"], "There is no optimizer 'adamq'. Similar names: adam"),
        (["--model.sched=cosin"], "model.sched must be one of 'cosine'"),
        (["--model.model_args.width=3"], "does not take one of these arguments: "),
        (["--data.augmentation=mirror"], "data.augmentation must be one of 'none', 'shift'"),
        (["--data.dataset=folder"], "needs a folder: set data.root"),
        (["--data.dataset=folder", "--data.root=nowhere"], "There is no folder nowhere"),
        (["--data.dataset=torch/mnist", "--data.root=nowhere"], "Could not open the split 'train'"),
        (["--data.dataset=hfds/beans"], "needs the package 'datasets'"),
        (["--data.in_chans=3"], "The model takes 1 channels, but data.in_chans is 3."),
        (["--data.mean=[0.5,0.5,0.5]", "--data.std=[1]"], "data.mean has 3 values and data.std 1"),
        (["--data.batch_size=2000"], "has 1077 images, fewer than one batch of 2000"),
        (["--data.batch_size=63", "--model.cutmix=1"], "set data.batch_size to an even number"),
        (["--model.name=test_vit", "--data.image_size=40"], "'test_vit' does not accept 40 x 40 images of 3 channels"),
        (["--ckpt_path=nowhere.ckpt"], "There is no checkpoint nowhere.ckpt"),
    ],
)
def test_wrong_input_gives_one_message(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    if args[0] == "--data.dataset=hfds/beans":
        monkeypatch.setitem(sys.modules, "datasets", None)
    assert message in fails(capsys, "fit", *args)
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_wrong_configuration_file(small, capsys):
    config = yaml.safe_load(SMALL)
    config["trainer"]["epochs"] = 3
    Path("wrong.yaml").write_text(yaml.dump(config))
    assert fails(capsys, "fit", "--config=wrong.yaml").startswith("There is no setting trainer.epochs.")
    assert "invalid choice: 'fut'" in fails(capsys, "fut")


def test_wrong_checkpoint(small, tmp_path, capsys):
    assert main(["fit", "--config", small, "--trainer.max_steps=1"]) == 0
    capsys.readouterr()
    checkpoint = "--ckpt_path=runs/small/version_0/checkpoints/last.ckpt"
    other = ["--config", small, checkpoint]
    message = fails(capsys, "test", *other, "--model.name=va_minimal_vit_nano_patch4_32")
    assert "The checkpoint is for the model 'va_minimal_vit_nano_patch7_28'" in message
    message = fails(capsys, "fit", *other, "--model.model_args.depth=2")
    assert "net.blocks.1.norm1.weight is missing" in message
    assert "and 9 more" in message
    assert "The checkpoint is for 10 classes, not for 4 classes" in fails(
        capsys, "test", *other, "--data.num_classes=4"
    )
    assert fails(capsys, "test", "--config", small) == (
        "The model has no trained weights: give --checkpoint FILE, or set model.pretrained."
    )
    weights = torch.load("runs/small/version_0/checkpoints/last.ckpt", weights_only=True)
    torch.save({**weights, "optimizer_states": []}, "partial.ckpt")
    assert "has the states of 0 optimizers and 1 schedules, but the training has 1 and 1" in fails(
        capsys, "fit", "--config", small, "--ckpt_path=partial.ckpt", "--trainer.max_steps=2"
    )
    del weights["optimizer_states"]
    torch.save(weights, "weights_only.ckpt")
    assert "holds weights only, so training cannot be resumed" in fails(
        capsys, "fit", "--config", small, "--ckpt_path=weights_only.ckpt"
    )
    Path("broken.ckpt").write_bytes(b"no checkpoint")
    assert "broken.ckpt cannot be read as a checkpoint" in fails(capsys, "test", "--ckpt_path=broken.ckpt")
    torch.save({"weight": torch.zeros(1)}, "weights.ckpt")
    assert "weights.ckpt is not a training checkpoint" in fails(capsys, "fit", "--ckpt_path=weights.ckpt")


FOLDER = ["--data.dataset=folder", "--data.root=pictures", "--model.name=va_minimal_vit_nano_patch4_32"]
QUICK = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


def test_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", "owl"):
        images(tmp_path / "pictures" / name, [f"{name}{number}.png" for number in range(10)])
    settings = [*FOLDER, "--data.batch_size=8", "--model.model_args.depth=1", "--data.augmentation=imagenet"]
    assert main(["fit", *settings, *QUICK, "--data.num_workers=2"]) == 0
    checkpoint = "runs/va_minimal_vit_nano_patch4_32/version_0/checkpoints/best.ckpt"
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["num_classes"] == 3
    # Images without classes.
    images(tmp_path / "new", ["a.jpg", "b.png"], mode="L")
    capsys.readouterr()
    assert main(["predict", "--ckpt_path", checkpoint, "--data.dataset=folder", "--data.root=new", *QUICK[:1]]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "b.png"]
    assert {row["class"] for row in rows} <= {"cat", "dog", "owl"}
    # Other classes, as many.
    (tmp_path / "pictures/owl").rename(tmp_path / "pictures/ape")
    message = fails(capsys, "test", "--ckpt_path", checkpoint, "--data.dataset=folder", "--data.root=pictures")
    assert message == "The checkpoint was trained on the classes cat, dog, owl; the data have ape, cat, dog."


def test_empty_folders_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    assert "There are no images in pictures" in fails(capsys, "fit", *FOLDER)
    images(tmp_path / "pictures", ["1.png"])
    assert "pictures has only one class" in fails(capsys, "fit", *FOLDER)


def test_averaging_and_sharding_exclude_each_other():
    class Trainer:
        callbacks = [EMAWeightAveraging()]
        strategy = ModelParallelStrategy()

    with pytest.raises(ConfigError, match=r"EMAWeightAveraging does not work with sharded models"):
        check_averaging(Trainer)


def test_recipes_are_found_by_name():
    packaged = recipes()
    root = Path(str(importlib.resources.files("visionattn"))) / "configs"
    assert packaged["classify/minimal_vit_digits"] == root / "classify/minimal_vit_digits.yaml"
    assert {str(path.relative_to(root))[: -len(".yaml")] for path in root.rglob("*.yaml")} == set(packaged)
    for name in ("minimal_vit_digits", "classify/minimal_vit_digits", "minimal_vit_digits.yaml"):
        assert find_recipe(name) == packaged["classify/minimal_vit_digits"]
    with pytest.raises(UnknownNameError, match=r"The recipes are: .*minimal_vit_digits"):
        find_recipe("minimal_vit_letters")


@pytest.mark.parametrize("name", recipes())
def test_recipes_parse_and_say_what_to_expect(name, tmp_path, monkeypatch, capsys):
    lines = recipes()[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    head = " ".join(line for line in lines if line.startswith("#"))
    assert "measured" in head.lower()
    assert "visionattn fit --config" in head
    assert main(["fit", "--config", name, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] > 0
