"""What a run says and leaves: start, epochs, skipped images, predictions, its folder."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from PIL import Image

from tests.forking import Fork
from visionattn.train.cli import main

CPU = ["--trainer.accelerator=cpu"]
TINY = [
    "--model.name=va_minimal_vit_nano_patch4_32",
    "--model.model_args={depth: 1, embed_dim: 16, num_heads: 1}",
    "--data.batch_size=4",
]
FIT = ["fit", *CPU, *TINY, "--data.dataset=folder", "--data.root=pictures", "--trainer.max_epochs=1"]


def images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (20, 16), (number * 9 % 256, 80, 160)).save(folder / name)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two classes with one unreadable image and a file that is not read."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        images(tmp_path / "pictures/train" / name, [f"{number}.png" for number in range(4)])
        images(tmp_path / "pictures/val" / name, ["1.png", "2.webp"])
    (tmp_path / "pictures/train/dog/3.png").write_bytes(b"")
    (tmp_path / "pictures/train/dog/4.heic").write_bytes(b"")
    return tmp_path / "pictures"


def lines(text, *begins):
    return [line for line in text.splitlines() if line.startswith(begins)]


def test_a_run_says_what_it_works_on_and_predictions_what_they_lack(pictures, capsys):
    assert main([*FIT, "--trainer.default_root_dir=elsewhere", "--data.num_workers=2"]) == 0
    output = capsys.readouterr().out
    run = pictures.parent / "elsewhere/va_minimal_vit_nano_patch4_32/version_0"
    assert output.splitlines()[:6] == [
        "va_minimal_vit_nano_patch4_32 on cpu, precision 32-true, 1 epochs, images of 3 x 32 x 32",
        "training: 8 images in 2 classes (cat 4, dog 4)",
        "validation: 4 images in 2 classes (cat 2, dog 2)",
        "test: there is no test split; the validation split is used instead",
        "left out in pictures/train: 1 with suffix .heic (4.heic)",
        f"run folder: {run}",
    ]
    (line,) = lines(output, "epoch 1/1: train/loss ")
    assert "val/accuracy" in line
    (head,) = [line for line in output.splitlines() if "measure" in line]
    assert [cell.strip() for cell in head.split("┃")[1:-1]] == ["measure", "training", "test (the validation split)"]
    (at,) = [n for n, line in enumerate(output.splitlines()) if line.startswith("Skipped because")]
    assert output.splitlines()[at] == "Skipped because unreadable: 1 image"
    assert "pictures/train/dog/3.png" in output.splitlines()[at + 1]
    assert not Path("runs").exists()

    checkpoint = str(run / "checkpoints/best.ckpt")
    images(pictures.parent / "new/sub", [f"{number}.png" for number in range(10)])
    (pictures.parent / "new/sub/3.png").write_bytes(b"")
    predict = ["predict", *CPU, "--ckpt_path", checkpoint, "--data.root=new", "--output=found.csv"]
    assert main(predict) == 1
    output = capsys.readouterr().out
    assert "prediction: 10 images" in output
    assert "new/sub/3.png" in output
    with open("found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"sub/{number}.png" for number in range(10) if number != 3]
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    before = Path("found.csv").read_bytes()
    Path("found.csv").write_bytes(b"mine")
    assert main(predict) == 2
    assert capsys.readouterr().err.startswith("visionattn: found.csv exists. Give --overwrite to replace it")
    assert main([*predict, "--overwrite"]) == 1
    assert Path("found.csv").read_bytes() == before
    assert main(["predict", *CPU, "--ckpt_path", checkpoint, "--data.root=new", "--output=found.txt"]) == 2
    assert "the file name must end in .csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "train/owl").mkdir(), "There are no images of the class owl in pictures/train"),
        (
            lambda root: images(root / "val/ape", ["1.png"]),
            "pictures/val has classes that are not in pictures/train: ape.",
        ),
        (lambda root: (root / "val").rename(root / "other"), "none can be held out: 0.1 of 8 images are 1"),
        (lambda root: [path.write_bytes(b"") for path in root.glob("train/dog/*.png")], "No image of the class 'dog'"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(pictures, capsys, break_it, message):
    break_it(pictures)
    assert main(FIT) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not Path("runs").exists()


def test_runs_where_nothing_can_be_written(pictures, capsys):
    Path("runs").write_text("a file")
    assert main(FIT) == 2
    error = capsys.readouterr().err.strip()
    assert "runs" in error
    assert "\n" not in error


def test_the_learning_rate_that_is_found_is_scheduled(pictures, monkeypatch):
    from lightning.pytorch.tuner import lr_finder

    monkeypatch.setattr(lr_finder._LRFinder, "suggestion", lambda self, **_: 0.25)
    found = ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=3"]
    assert main([*FIT, "--trainer.max_epochs=4", "--trainer.log_every_n_steps=1", *found]) == 0
    with open("runs/va_minimal_vit_nano_patch4_32/version_0/metrics.csv", newline="") as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    # Half a cosine of eight updates.
    wanted = [1e-6 + (0.25 - 1e-6) * (1 + torch.cos(torch.tensor(torch.pi * n / 8)).item()) / 2 for n in range(8)]
    assert rates == pytest.approx(wanted, rel=1e-4)
    assert not list(Path().rglob(".lr_find*"))


CALLBACKS = {
    "StochasticWeightAveraging": ["swa_lrs=0.01", "swa_epoch_start=1"],
    "BatchSizeFinder": ["max_trials=1", "steps_per_trial=1", "init_val=4"],
    "EarlyStopping": ["monitor=val/loss"],
    "GradientAccumulationScheduler": ["scheduling={0: 2, 1: 1}"],
    "LearningRateMonitor": [],
    "ModelSummary": [],
    "Timer": ["duration=00:12:00:00"],
    "OnExceptionCheckpoint": ["dirpath=saved"],
    "ModelPruning": ["pruning_fn=l1_unstructured", "amount=0.1"],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_stock_callbacks(pictures, capsys, name):
    options = [f"--trainer.callbacks.{option}" for option in CALLBACKS[name]]
    settings = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    assert main([*FIT, *settings, f"--trainer.callbacks+={name}", *options]) == 0
    run = Path("runs/va_minimal_vit_nano_patch4_32/version_0")
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    averaged = {"averaged.ckpt"} if name == "StochasticWeightAveraging" else set()
    assert checkpoints == {"best.ckpt", "last.ckpt"} | averaged
    weights = "averaged.ckpt" if averaged else "best.ckpt"
    assert f"the weights of this table are in {run.resolve()}/checkpoints/{weights}" in capsys.readouterr().out


def test_sigterm_saves_and_ends_with_143(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", *CPU, "--trainer.max_epochs=400", "--trainer.num_sanity_val_steps=0"]
    args += ["--model.model_args={depth: 1, embed_dim: 32, num_heads: 2}", "--data.batch_size=256"]
    code = "import sys; from visionattn.cli import main; sys.exit(main(sys.argv[1:]))"
    process = Fork(code, ("visionattn", *args))
    last = tmp_path / "runs/va_minimal_vit_nano_patch7_28/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 90
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait(90)
    output, message = done.stdout, done.stderr
    assert done.returncode == 143
    assert "Traceback" not in message
    assert "Stopping as soon as the state can be saved." in output
    said, command = message.strip().splitlines()[-2:]
    assert said == f"Stopped by SIGTERM. The state is saved in {last}. Resume with:"
    assert command.split()[:2] == ["visionattn", "fit"]
    assert torch.load(last, weights_only=True)["global_step"] > 0


def test_a_measure_that_nobody_logs_is_one_line(pictures, capsys):
    assert main([*FIT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/psnr"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("visionattn: Early stopping conditioned on metric `val/psnr` which is not available.")
    assert "\n" not in error
