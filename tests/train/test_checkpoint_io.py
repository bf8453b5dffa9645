"""A disk that is full leaves the checkpoint of before and one message."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from visionattn.errors import CheckpointError, StorageError
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.cli import main


def test_round_trip(tmp_path):
    path = tmp_path / "new/folder/last.ckpt"
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": {"weight": torch.ones(3)}, "epoch": 2, "pytorch-lightning_version": "2.6.0"}, path
    )
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: writing fails as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--data.batch_size=8"]
    with full_disk(100_000):
        assert main(args) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("visionattn: Could not write ")
    assert message.endswith("best.ckpt: File too large. No partial file was left.")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ["config.yaml", "hparams.yaml", "metrics.csv"]


def test_full_disk_keeps_the_checkpoint_of_before(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "epoch": 1, "pytorch-lightning_version": "2.6.0"}, path)
    with full_disk(10_000), pytest.raises(StorageError, match=r"last.ckpt: File too large. No partial file was left"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(100_000)}, "epoch": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_unreadable_checkpoints(tmp_path, content):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is a folder: give the checkpoint, then"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"broken.ckpt cannot be read as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_checkpoints_with_code_are_not_loaded(tmp_path):
    path = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "made": Path()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
