"""The super-resolution task: losses, teacher, averaged weights, fused measuring, checkpoints and the command line."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import visionattn
from visionattn.data.restore.datamodule import RestoreData
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError, InputError
from visionattn.metrics.luma import luma, psnr_y, to_uint8
from visionattn.train.cli import main
from visionattn.train.restore import RestoreTask

TINY = {"width": 4, "img_range": 1.0}


@pytest.fixture
def pictures(tmp_path):
    """One picture of waves, as folder."""
    y, x = np.mgrid[:48, :40] / 1.5
    waves = [np.sin(x + y), np.sin(1.7 * x - y), np.cos(0.6 * x * y)]
    picture = np.stack([np.clip(127 + 110 * wave, 0, 255).astype(np.uint8) for wave in waves], axis=-1)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(picture).save(tmp_path / "pictures/waves.png")
    return str(tmp_path / "pictures")


def task(**settings):
    torch.manual_seed(0)
    return RestoreTask("va_span_ch26_x2", **{"model_args": TINY, **settings})


def fit(tmp_path, pictures, restore, epochs=1, crops=32, **trainer_args):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **trainer_args,
    )
    trainer.fit(restore, RestoreData(pictures, pictures, patch_size=8, epoch_crops=crops, batch_size=4))
    return trainer


def detached(restore):
    """The task outside of a trainer's loop."""
    restore.trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    restore.trainer.strategy.optimizers = [torch.optim.SGD(restore.parameters(), 0.1)]
    restore.log = lambda *args, **kwargs: None
    return restore


def test_it_learns_a_picture(tmp_path, pictures):
    restore = task(lr=0.01, weight_decay=0.0)
    before = fit(tmp_path, pictures, task(lr=0.0, sched="none")).callback_metrics["val/psnr_y"]
    after = fit(tmp_path, pictures, restore, epochs=5, crops=120).callback_metrics["val/psnr_y"]
    assert after > before + 5


def test_losses():
    small = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    large = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for loss, eps in (("charbonnier", 0.1), ("l1", 0.1)):
        restore = detached(task(loss=loss, eps=eps))
        difference = restore(small.double().float() / 255) - large / 255
        expected = difference.abs() if loss == "l1" else (difference**2 + eps**2) ** 0.5
        found = restore.training_step((small, large, torch.zeros(2)), 0)
        assert found.item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_teacher(tmp_path, pictures):
    teacher = task(lr=0.01)
    fit(tmp_path, pictures, teacher).save_checkpoint(tmp_path / "teacher.ckpt")
    student = detached(task(teacher=str(tmp_path / "teacher.ckpt"), teacher_weight=0.25, loss="l1"))
    assert student._teacher == ()
    student.setup("fit")
    small, large = torch.rand(2, 3, 8, 8).mul(255).byte(), torch.rand(2, 3, 16, 16).mul(255).byte()
    found = student.training_step((small, large, torch.zeros(2)), 0)
    with torch.no_grad():
        output, taught = student(small / 255), teacher(small / 255)
    expected = 0.75 * (output - large / 255).abs().mean() + 0.25 * (output - taught).abs().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.state_dict().keys() == task().state_dict().keys()
    assert not any(parameter.requires_grad for parameter in student._teacher[0].parameters())
    # It has a place in a whole run, too.
    trainer = fit(tmp_path, pictures, task(teacher=str(tmp_path / "teacher.ckpt"), lr=0.01))
    assert trainer.global_step == 8

    other = RestoreTask("va_span_ch26_x4", model_args=TINY, teacher=str(tmp_path / "teacher.ckpt"))
    with pytest.raises(ConfigError, match=r"teacher\.ckpt upscales 2 times, the model 4 times"):
        other.setup("fit")


def test_measure_is_the_protocol(pictures):
    data = RestoreData(val=pictures, scale=2)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    restore = detached(task())
    restore.on_validation_epoch_start()
    restore.validation_step(batch, 0)
    restore.validation_step((*batch[:2], torch.tensor([IGNORED])), 1)
    with torch.no_grad():
        output = restore.net(batch[0] / 255)[0]
    levels = np.floor(np.clip(output.permute(1, 2, 0).double().numpy() * 255, 0, 255) + 0.5)
    target = batch[1][0].permute(1, 2, 0).numpy()
    y1, y2 = ((image @ [65.481, 128.553, 24.966] / 255 + 16)[2:-2, 2:-2] for image in (levels, target))
    expected = peak_signal_noise_ratio(y1, y2, data_range=255)
    assert restore.val_psnr.compute().item() == pytest.approx(expected, abs=1e-4)


def test_luma():
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]], np.uint8)
    assert luma(corners)[0] == pytest.approx([16, 235, 81.481, 40.966])
    image = torch.tensor([-1.0, 0.5 / 255, 1.4999 / 255, 2.0]).view(1, 2, 2).expand(3, 2, 2)
    assert to_uint8(image)[..., 0].tolist() == [[0, 1], [1, 255]]
    assert psnr_y(np.zeros((6, 6, 3), np.uint8), np.zeros((6, 6, 3), np.uint8), 2) == math.inf
    with pytest.raises(InputError, match=r"not finite"):
        to_uint8(image * math.nan)
    with pytest.raises(InputError, match=r"no pixels left without its border of 3"):
        psnr_y(np.zeros((6, 9, 3), np.uint8), np.zeros((6, 9, 3), np.uint8), 3)
    with pytest.raises(InputError, match=r"must have the same shape"):
        psnr_y(np.zeros((6, 9, 3), np.uint8), np.zeros((6, 8, 3), np.uint8), 1)


def test_branches_are_measured_and_loaded_fused(tmp_path, pictures):
    restore = task(model_args={**TINY, "branches": True}, lr=0.003)
    trainer = fit(tmp_path, pictures, restore)
    trainer.save_checkpoint(tmp_path / "span.ckpt")
    loaded = visionattn.load(tmp_path / "span.ckpt")
    # Training goes on with the branches.
    assert len(list(restore.net.parameters())) > len(list(loaded.parameters())) == len(list(task().net.parameters()))
    image = torch.rand(1, 3, 12, 9)
    with torch.no_grad():
        assert torch.allclose(loaded(image), restore.net(image), atol=1e-5)
        assert torch.equal(loaded(image), restore.for_use()(image))


def test_multistep_halves(tmp_path, pictures):
    rates = []
    restore = task(lr=0.1, sched="multistep", sched_args={"decay_milestones": [1, 2], "decay_rate": 0.5})
    restore.on_train_batch_end = lambda *_: rates.append(restore.trainer.optimizers[0].param_groups[0]["lr"])
    fit(tmp_path, pictures, restore, epochs=3, crops=16)
    # timm halves one update before the milestone.
    assert rates == pytest.approx([0.1] * 2 + [0.05] * 4 + [0.025] * 6)


SMALL = """
model:
  class_path: visionattn.train.restore.RestoreTask
  init_args: {name: va_span_ch26_x2, model_args: {width: 4, img_range: 1.0, branches: true}, lr: 0.003}
data:
  class_path: visionattn.data.restore.RestoreData
  init_args: {train: pictures, val: pictures, patch_size: 8, epoch_crops: 16, batch_size: 4}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - {class_path: EMAWeightAveraging, init_args: {decay: 0.8}}
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "step{step}", auto_insert_metric_name: false}
"""


def metrics(folder, column):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_the_command_fits_resumes_and_tests(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    assert main(["fit", "--config", "small.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "psnr y" in shown
    run = Path("runs/small/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["best"]["monitor"] == "val/psnr_y"
    # The table says what the fused network costs.
    assert f"{sum(p.numel() for p in task().parameters()):,}" in shown

    columns = ("train/loss", "train/lr", "val/psnr_y", "test/psnr_y")
    before = {column: metrics(run, column) for column in columns}
    assert [len(rows) for rows in before.values()] == [8, 8, 2, 1]  # the test is on the validation images
    assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/step6.ckpt"]) == 0
    assert {column: metrics(run, column) for column in columns} == before

    # The checkpoint holds the averaged weights, which are those that were measured.
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    key = "net.conv_cat.weight"
    assert not torch.equal(best["state_dict"][key], best["current_model_state"][key])
    assert torch.equal(visionattn.load(run / "checkpoints/best.ckpt").state_dict()[key[4:]], best["state_dict"][key])
    capsys.readouterr()
    data = ["--data=RestoreData", "--data.val=pictures"]
    assert main(["test", "--ckpt_path", f"{run}/checkpoints/best.ckpt", *data, "--trainer.accelerator=cpu"]) == 0
    assert f"{float(before['test/psnr_y'][0][1]):.4f}" in capsys.readouterr().out
    restore = RestoreTask("va_span_ch28_x2", model_args=TINY)
    with pytest.raises(CheckpointError, match=r"is for the model 'va_span_ch26_x2', not for the model 'va_"):
        restore.on_load_checkpoint(best)
    with pytest.raises(CheckpointError, match=r"does not fit the model 'va_span_ch26_x2': .* and \d+ more"):
        task().on_load_checkpoint(best)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l3"}, "model.loss must be one of 'charbonnier', 'l1'; got 'l3'."),
        ({"sched": "cosin"}, "model.sched must be one of .*; got 'cosin'"),
        ({"opt": "adamq"}, "There is no optimizer 'adamq'"),
        ({"teacher_weight": 0.0}, "above 0 and at most 1; got 0.0"),
        ({"name": "va_minimal_vit_nano_patch7_28"}, "must be a model of the task 'restore' for colour images"),
        ({"model_args": {"in_chans": 1}}, "must be a model of the task 'restore' for colour images"),
        ({"model_args": {"depth": 3}}, "does not take one of these arguments"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        RestoreTask(**settings)


def test_scales_must_agree(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    assert main(["fit", "--config", "small.yaml", "--data.scale=4"]) == 2
    assert capsys.readouterr().err == "visionattn: The model upscales 2 times, but data.scale is 4.\n"
