"""Training DCAL: the loss, what is trained and how, the network that is kept, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import visionattn
from visionattn.errors import ConfigError
from visionattn.train.cli import main
from visionattn.train.dual_cross import DualCrossTask

TINY = {"img_size": 8, "patch_size": 2, "depth": 2, "embed_dim": 32, "num_heads": 2}


def task(**settings):
    torch.manual_seed(0)
    return DualCrossTask(**{"model_args": TINY, "in_chans": 1, **settings})


def sides():
    """Noise that is brighter on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=generator)
    images = 0.5 * torch.randn(256, 1, 8, 8, generator=generator)
    images[labels == 0, ..., :4] += 1
    images[labels == 1, ..., 4:] += 1
    return TensorDataset(images, labels)


def fit(module, epochs, folder):
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(sides(), batch_size=32, shuffle=True), DataLoader(sides(), batch_size=256))
    return trainer


def test_loss_is_its_equation():
    module = task(label_smoothing=0.1).double()
    weights = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    module.weighting.weight.data.copy_(weights)
    images, targets = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(10, (5,))
    logits = module.net.branch_logits(module.net.forward_branches(images, torch.tensor([4, 0, 1, 2, 3])))
    losses = [F.cross_entropy(branch, targets, label_smoothing=0.1) for branch in logits]
    expected = sum((loss * (-w).exp() + w) / 2 for loss, w in zip(losses, weights))
    found = module.losses(images, targets, 0.1)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses))
    torch.testing.assert_close(module.weighting(torch.stack(found)), expected)


def test_it_learns_and_the_network_is_kept(tmp_path):
    module = task(num_classes=2, lr=3e-3)
    trainer = fit(module, 15, tmp_path)
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    assert (module.weighting.weight != 0).all()
    assert {"train/loss_sa", "train/loss_glca", "train/loss_pwca"} <= trainer.callback_metrics.keys()
    (optimizer,) = trainer.optimizers
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    exempt = [module.weighting.weight, module.net.pos_embed, module.net.cls_token, module.net.norm.weight]
    assert not decayed & {id(parameter) for parameter in exempt}
    assert {id(module.net.glca.kv.weight), id(module.net.head.weight)} <= decayed
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = visionattn.load(tmp_path / "last.ckpt")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(images), module.eval()(images))


def test_mixing(tmp_path):
    trainer = fit(task(num_classes=2, mixup=0.2, label_smoothing=0.1), 1, tmp_path)
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_the_command_line_knows_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "dcal_folder", "--model.label_smoothing", "0.1", "--print_config"]) == 0
    assert "label_smoothing: 0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "vit_tiny_patch16_224", "model_args": None},
            r"va_dcal_\* model with three branches; 'vit_tiny_patch16_224' has one",
        ),
        ({"model_args": {**TINY, "sa_only": True}}, r"'va_dcal_nano_patch4_32' has one"),
        ({"layer_decay": 0.7}, r"remove model\.layer_decay"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ConfigError, match=message):
        task(**settings)
