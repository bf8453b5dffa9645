"""The classification task: losses, metrics, schedule, precision and the ways to save memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from timm.optim import create_optimizer_v2
from torchmetrics.functional.classification import multiclass_calibration_error

from visionattn.data.classify.datamodule import ClassifyData
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError
from visionattn.train.classify import ClassifyTask

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2}


class Record(Callback):
    """Keeps losses and learning rates."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(tmp_path, trainer_args=None, model_args=TINY, **settings):
    torch.manual_seed(0)
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[record],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "limit_val_batches": 0, "limit_train_batches": 3, **(trainer_args or {})},
    )
    task = ClassifyTask(model_args=model_args, **settings)
    trainer.fit(task, ClassifyData(batch_size=64))
    return record, task, trainer


def test_schedule_is_stepped_each_update(tmp_path):
    record, *_ = fit(tmp_path, lr=1.0, warmup_epochs=1, min_lr=0.1, sched_args={"warmup_lr": 0.0}, weight_decay=0.0)
    # Three updates of warm-up, then a cosine over all six.
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 6)) for step in (3, 4, 5)]
    assert record.rates == pytest.approx([1 / 3, 2 / 3, *cosine, 0.1])


@pytest.mark.parametrize("sched", ["step", "wsd", "none"])
def test_other_schedules(tmp_path, sched):
    args = {"decay_epochs": 1} if sched == "step" else None
    record, *_ = fit(tmp_path, lr=0.01, sched=sched, sched_args=args, min_lr=0.0)
    last = {"step": 0.0001, "wsd": 0.0, "none": 0.01}[sched]
    assert record.rates[-1] == pytest.approx(last, abs=1e-8)


def test_schedule_needs_an_end(tmp_path):
    with pytest.raises(ConfigError, match=r"A schedule needs the length of training"):
        fit(tmp_path, {"max_epochs": -1})


def test_layer_decay_and_optimizer_settings(tmp_path):
    _, task, trainer = fit(tmp_path, opt="sgd", layer_decay=0.5, opt_args={"momentum": 0.7}, lr=0.2, sched="constant")
    (optimizer,) = trainer.optimizers
    expected = create_optimizer_v2(task.net, "sgd", lr=0.2, weight_decay=0.05, layer_decay=0.5, momentum=0.7)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [g["lr_scale"] for g in expected.param_groups]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * optimizer.param_groups[0]["lr_scale"])


def test_fused_updates_are_those_of_the_plain_loop(tmp_path):
    found = {}
    for fused in (None, False):
        opt_args = {} if fused is None else {"fused": fused}
        _, task, trainer = fit(tmp_path / str(fused), opt_args=opt_args)
        assert {group["fused"] for group in trainer.optimizers[0].param_groups} == {fused is None}
        found[fused] = task.state_dict()
    for key, value in found[None].items():
        torch.testing.assert_close(value, found[False][key], rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_torch(tmp_path):
    task = ClassifyTask(model_args=TINY, label_smoothing=0.2)
    task.trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    task.log = lambda *args, **kwargs: None
    task.trainer.strategy.optimizers = [torch.optim.SGD(task.parameters(), 0.1)]
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8)
    expected = F.cross_entropy(task(images), labels, label_smoothing=0.2)
    assert torch.equal(task.training_step((images, labels), 0), expected)


def test_metrics_count_each_image_once():
    task = ClassifyTask(model_args=TINY).eval()
    torch.manual_seed(1)
    images, labels = torch.randn(40, 1, 28, 28), torch.randint(0, 10, (40,))
    with torch.no_grad():
        logits = task(images)
        copies = torch.full((3,), IGNORED)
        batches = [(images[:25], labels[:25]), (torch.cat([images[25:], images[:3]]), torch.cat([labels[25:], copies]))]
        for batch in [*batches, (images[:3], copies)]:
            task._evaluate(batch, task.test_metrics, task.test_loss)
    found = task.test_metrics.compute()
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert found["test/accuracy_top5"] == pytest.approx(top5)
    error = multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15)
    assert found["test/calibration_error"] == pytest.approx(error.item())
    assert task.test_loss.compute() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_top5_needs_more_than_five_classes():
    assert set(ClassifyTask(model_args=TINY, num_classes=5).val_metrics.keys()) == {
        "val/accuracy",
        "val/calibration_error",
    }


def test_prediction():
    task = ClassifyTask(model_args=TINY).eval()
    found = task.predict_step((torch.randn(3, 1, 28, 28), torch.zeros(3)), 0)
    assert torch.allclose(found["probabilities"].sum(1), torch.ones(3))
    assert torch.equal(found["labels"], found["probabilities"].argmax(1))


def test_data_config_follows_the_model():
    config = ClassifyTask("test_vit", model_args={"img_size": 32}, in_chans=1, num_classes=4).data_config
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == (0.5,)
    assert ClassifyTask(model_args=TINY).data_config["input_size"] == (1, 28, 28)


def test_bf16(tmp_path):
    plain, *_ = fit(tmp_path)
    record, task, _ = fit(tmp_path, {"precision": "bf16-mixed"})
    assert record.losses == pytest.approx(plain.losses, rel=0.02)
    assert record.losses != plain.losses
    assert all(parameter.dtype == torch.float32 for parameter in task.parameters())


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    model_args = {**TINY, "depth": 2}
    plain, *_ = fit(tmp_path, model_args=model_args)
    record, task, _ = fit(tmp_path, model_args=model_args, grad_checkpointing=True)
    assert task.net.grad_checkpointing
    assert record.losses == pytest.approx(plain.losses, rel=1e-6)


def test_channels_last_reaches_the_maps(tmp_path):
    settings = {"name": "va_halonet_nano_32", "in_chans": 1, "model_args": {"depths": (1, 1, 1)}}
    record, task, _ = fit(tmp_path, **settings, channels_last=True)
    plain, *_ = fit(tmp_path, **settings)
    features = task.net.forward_features(torch.randn(2, 1, 28, 28))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert record.losses == pytest.approx(plain.losses, rel=1e-3)


def test_compile_keeps_the_keys(tmp_path, monkeypatch):
    compiled = []
    # The real compiler takes half a minute on two cores; which call is made is what can go wrong here.
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    _, task, _ = fit(tmp_path, compile=True)
    assert compiled == [task.net._call_impl]
    assert all(key.startswith("net.") and "_orig_mod" not in key for key in task.state_dict())


def test_pretrained_weights_that_do_not_exist():
    with pytest.raises(CheckpointError, match=r"The weights of 'va_minimal_vit_nano_patch7_28' could not be loaded"):
        ClassifyTask(pretrained=True, model_args=TINY)


def test_model_without_gradient_checkpointing(monkeypatch):
    def refuse(self, enable=True):
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing", refuse)
    with pytest.raises(ConfigError, match=r"does not support gradient checkpointing"):
        ClassifyTask(grad_checkpointing=True)


def test_a_file_is_no_name(tmp_path):
    file = tmp_path / "weights.safetensors"
    with pytest.raises(ConfigError, match=r"must be a name; got the file .*--model.model_args.checkpoint_path"):
        ClassifyTask(str(file))


def test_the_task_says_what_its_predictions_are():
    task = ClassifyTask(model_args={"depth": 1}, num_classes=3)
    output = {"probabilities": torch.tensor([[0.25, 0.75, 0.0]]), "labels": torch.tensor([1])}
    assert task.prediction_columns == ("label", "class", "probability")
    assert list(task.prediction_rows(output, ["a", "b", "c"])) == [[1, "b", "0.750000"]]
    assert list(task.prediction_rows(output, None)) == [[1, 1, "0.750000"]]
    assert not task.starts_trained
