"""Fine-tuning: where it begins, what trains, and how classes are weighed."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from safetensors.torch import save_file

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer

from visionattn import cli
from visionattn.checkpoints import create, load_weights
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.data.samplers import BalancedSampler
from visionattn.errors import CheckpointError, ConfigError
from visionattn.train.classify import ClassifyTask
from visionattn.train.cli import main
from visionattn.train.finetune import classifier_parameters, frozen_by_stage, weights_of_classes
from visionattn.train.frozen import read_vectors

RESNET = "test_resnet"  # timm's smallest with batch norms
GREY = {"in_chans": 1}


class Changes(Callback):
    """Names of the parameters and buffers that an epoch changed, epoch by epoch."""

    def __init__(self):
        self.found = []

    def on_train_epoch_start(self, trainer, task):
        self.before = {key: value.clone() for key, value in task.net.state_dict().items()}

    def on_train_epoch_end(self, trainer, task):
        after = task.net.state_dict()
        self.found.append({key for key, value in self.before.items() if not torch.equal(value, after[key])})


def fit(tmp_path, epochs=1, callbacks=(), **settings):
    torch.manual_seed(0)
    task = ClassifyTask(**{"name": RESNET, "model_args": GREY, "lr": 0.01, "sched": "constant", **settings})
    changes = Changes()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=1,
        callbacks=[*callbacks, changes],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, ClassifyData(batch_size=64, image_size=32))
    return task, changes.found


def test_a_file_of_weights_is_taken_without_its_classifier(tmp_path):
    given = timm.create_model(RESNET, num_classes=7)
    save_file(given.state_dict(), tmp_path / "w.safetensors")
    task = ClassifyTask(RESNET, num_classes=3, pretrained=True, checkpoint=str(tmp_path / "w.safetensors"))
    for key, value in given.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, task.net.state_dict()[key]), key
    assert task.net.fc.weight.shape[0] == 3
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not fit test_resnet"):
        ClassifyTask(RESNET, checkpoint=str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match=r"There is no file gone\.pth"):
        ClassifyTask(RESNET, checkpoint="gone.pth")


def test_position_embeddings_of_another_size_are_resized_as_timm_does(tmp_path):
    given = timm.create_model("test_vit", img_size=160)
    torch.save(given.state_dict(), tmp_path / "w.pth")
    model = create("test_vit", img_size=96, num_classes=2)
    load_weights(model, tmp_path / "w.pth", drop_classifier=True)
    assert model.pos_embed.shape != given.pos_embed.shape
    assert torch.equal(model.blocks[0].attn.qkv.weight, given.blocks[0].attn.qkv.weight)


def test_a_checkpoint_of_a_run_names_its_model(tmp_path):
    file = tmp_path / "w.safetensors"
    given = timm.create_model("va_minimal_vit_micro_patch4_32", num_classes=4)
    save_file(given.state_dict(), file)
    task = ClassifyTask(str(file), num_classes=2)
    assert task.hparams.name == "va_minimal_vit_micro_patch4_32"
    assert task.hparams.checkpoint == str(file)
    assert torch.equal(next(task.net.parameters()), next(given.parameters()))
    save_file({"patch_embed.proj.weight": torch.ones(1)}, file)
    with pytest.raises(
        CheckpointError, match=r"does not identify its model: give the name by --model.name and the file by"
    ):
        ClassifyTask(str(file))
    with pytest.raises(ConfigError, match=r"remove model\.checkpoint"):
        ClassifyTask(str(file), checkpoint="other.pth")


def test_weights_that_cannot_be_had_are_one_line_that_says_what_to_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("visionattn.checkpoints.creating.timm.create_model", refuse)
    with pytest.raises(CheckpointError, match=r"'resnet18' are not on this machine .*--model.checkpoint FILE"):
        ClassifyTask("resnet18", pretrained=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_stages_freeze_from_the_image_on(name):
    net = timm.create_model(name, num_classes=3)
    every, head = {key for key, _ in net.named_parameters()}, classifier_parameters(net)
    assert frozen_by_stage(net, 0) == set()
    assert frozen_by_stage(net, -1) == every - head
    first, second = frozen_by_stage(net, 1), frozen_by_stage(net, 2)
    assert first < second < every - head
    assert next(key for key, _ in net.named_parameters() if key not in ("cls_token", "pos_embed")) in first
    with pytest.raises(ConfigError, match=r"which has \d+ stages, or -1"):
        frozen_by_stage(net, 99)


def test_frozen_stages_keep_weights_and_statistics(tmp_path):
    task, (changed,) = fit(tmp_path, freeze=-1)
    assert changed == {"fc.weight", "fc.bias"}
    assert {key for key, weight in task.net.named_parameters() if weight.requires_grad} == changed
    _, (changed,) = fit(tmp_path, freeze=2)
    frozen = frozen_by_stage(timm.create_model(RESNET), 2)
    assert not changed & frozen
    assert {"fc.weight", "layer4.0.conv1.weight"} <= changed


def test_the_head_trains_first_and_then_all(tmp_path):
    _, (first, second) = fit(tmp_path, epochs=2, head_epochs=1)
    assert first == {"fc.weight", "fc.bias"}
    assert {"layer1.0.conv1.weight", "layer1.0.bn1.running_mean"} < second


def test_statistics_of_batch_norms_can_be_kept(tmp_path):
    _, (changed,) = fit(tmp_path, freeze_norms=True)
    assert not [key for key in changed if "running" in key]
    assert "layer1.0.bn1.weight" in changed


def test_training_begins_with_the_linear_classifier_of_the_frozen_features(tmp_path, capsys):
    class Begin(Callback):
        def on_train_start(self, trainer, task):
            data = trainer.datamodule
            vectors = read_vectors(task.net, data.still_loader("val", 10_000), data.class_names)
            logits = vectors.vectors @ task.net.fc.weight.T.detach() + task.net.fc.bias.detach()
            self.accuracy = (logits.argmax(1) == vectors.labels).double().mean().item()

    begin = Begin()
    task, _ = fit(tmp_path, callbacks=[begin], linear_start=True)
    assert begin.accuracy == pytest.approx(task.frozen.linear, abs=0.005)
    assert task.frozen.linear > 0.5
    assert "k-NN" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="does not identify its classifier layer"):
        frozen_by_stage(torch.nn.Linear(2, 2), 1)


def test_classes_are_weighed_inversely_to_their_images(tmp_path):
    class Labels:
        num_classes = 3

        def training_labels(self):
            return [0, 0, 0, 1]

    weights = weights_of_classes(Labels())
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0])
    task, _ = fit(tmp_path, class_weights=True, mixup=0.2)
    assert task._class_weights.mean() == pytest.approx(1, abs=0.01)


def test_balanced_draws_are_even_and_follow_from_seed_and_epoch():
    labels = [0] * 900 + [1] * 100
    sampler = BalancedSampler(labels, 1, 0, seed=3, labels=labels)
    first = [key.sample for key in sampler]
    assert len(first) == 1000
    assert Counter(labels[sample] for sample in first)[1] == pytest.approx(500, abs=60)
    sampler.start = 10
    assert [key.sample for key in sampler] == first[10:]
    sampler.start = 0
    sampler.set_epoch(1)
    assert [key.sample for key in sampler] != first
    halves = [[key.sample for key in BalancedSampler(labels, 2, rank, 3, labels)] for rank in (0, 1)]
    assert [sample for pair in zip(*halves) for sample in pair] == first


def test_settings_out_of_range_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, message in (
        ("--model.freeze=-2", "model.freeze must be at least -1"),
        ("--model.freeze=40", "which has"),
        ("--model.checkpoint=gone.pth", "There is no file gone.pth"),
        ("--model.class_weights=true --data.balanced=true", "both balance the classes"),
    ):
        assert main(["fit", "--trainer.accelerator=cpu", *option.split()]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_command_takes_a_file_as_the_name_of_the_model(tmp_path, monkeypatch):
    # The command keeps hyperparameters as they were typed; the task must replace the file there too.
    monkeypatch.chdir(tmp_path)
    given = timm.create_model("va_minimal_vit_nano_patch7_28", num_classes=4)
    save_file(given.state_dict(), "w.safetensors")
    arguments = "fit minimal_vit_digits --model.name w.safetensors --model.model_args null --trainer.fast_dev_run true"
    assert cli.main([*arguments.split(), "--trainer.accelerator", "cpu", "--data.num_workers", "0"]) == 0
