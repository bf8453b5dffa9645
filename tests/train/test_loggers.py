"""Loggers by name on the command line: what they write, without a server."""

from __future__ import annotations

import csv
import importlib.util

import pytest

pytest.importorskip("lightning")

from visionattn.train.cli import main

SMALL = [
    "--model.model_args={depth: 1, embed_dim: 32, num_heads: 2}",
    "--data.batch_size=512",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
]


def fit(*options):
    assert main(["fit", *SMALL, *options]) == 0


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_csv(tmp_path):
    fit("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mine")
    (file,) = tmp_path.glob("logs/mine/version_0/metrics.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {"train/loss", "train/lr", "val/accuracy", "val/loss", "test/accuracy"} <= set(rows[0])


def test_tensorboard(tmp_path):
    needs("tensorboard")
    fit("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mine")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs/mine/version_0"))
    events.Reload()
    assert {"train/loss", "val/accuracy", "test/accuracy"} <= set(events.Tags()["scalars"])
    assert (tmp_path / "logs/mine/version_0/checkpoints/best.ckpt").is_file()


def test_wandb_offline(tmp_path):
    needs("wandb")
    fit("--trainer.logger=WandbLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.offline=true")
    assert len(list(tmp_path.glob("logs/wandb/offline-run-*/*.wandb"))) == 1


def test_mlflow_offline(tmp_path, monkeypatch):
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # without it newer versions ask for a database
    fit("--trainer.logger=MLFlowLogger", "--trainer.logger.save_dir=mlruns")
    assert len(list(tmp_path.glob("mlruns/*/*/metrics/val/accuracy"))) == 1
