"""Masked image modelling: what is hidden, the loss, what is learned, and the network that is kept."""

from __future__ import annotations

import pytest
import timm
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import visionattn
from visionattn.errors import CheckpointError, ConfigError
from visionattn.train.cli import main
from visionattn.train.masked import MaskedTask

SMALL = {"depth": 2, "embed_dim": 24, "img_size": 16}


def task(**settings):
    torch.manual_seed(0)
    return MaskedTask(**{"model_args": SMALL, "decoder_dim": 16, "decoder_depth": 1, **settings})


def test_encoder_sees_the_shown_patches_only():
    masked = task().eval()
    images = torch.randn(2, 3, 16, 16)
    order = torch.rand(2, 16).argsort(dim=1)
    shown = order[:, : masked.num_shown]
    assert masked.num_shown == 4
    other = images.clone()
    for image, places in zip(other, order[:, 4:].tolist()):
        for place in places:
            top, left = 4 * (place // 4), 4 * (place % 4)
            image[:, top : top + 4, left : left + 4] = 0
    torch.testing.assert_close(masked.encode(images, shown), masked.encode(other, shown))
    assert masked.encode(images, shown).shape == (2, 5, 24)


def test_all_patches_in_order_are_the_network_itself():
    masked = task().eval()
    images = torch.randn(2, 3, 16, 16)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(masked.encode(images, everything), masked.net.forward_features(images))


def test_loss_is_its_equation():
    masked = task().double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    order = torch.rand(3, 16).argsort(dim=1)
    shown = order[:, :4]
    painted = masked.decoder(masked.encode(images, shown), shown)
    expected = []
    for image, places, result in zip(images, order[:, 4:].tolist(), painted):
        errors = []
        for place in places:
            top, left = 4 * (place // 4), 4 * (place % 4)
            patch = image[:, top : top + 4, left : left + 4].flatten()
            wanted = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            errors.append((result[place] - wanted).square().mean())
        expected.append(torch.stack(errors).mean())
    torch.testing.assert_close(masked.losses(images, order), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_decoder_puts_each_token_in_its_place():
    masked = task().eval()
    encoded = torch.randn(1, 5, 24)
    seen = []
    masked.decoder.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    masked.decoder(encoded, torch.tensor([[7, 2, 0, 15]]))
    tokens = masked.decoder.embed(encoded)[0]
    positions = masked.decoder.positions
    for token, place in ((1, 7), (2, 2), (3, 0), (4, 15)):
        torch.testing.assert_close(seen[0][0, 1 + place], tokens[token] + positions[place])
    torch.testing.assert_close(seen[0][0, 1 + 5], masked.decoder.hidden + positions[5])


def stripes():
    """Images of two kinds, told apart by any patch."""
    angle = (torch.arange(256) % 2).view(-1, 1, 1, 1) * torch.pi / 2
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = torch.sin(x * angle.cos() + y * angle.sin()).expand(-1, 3, -1, -1)
    return TensorDataset(images.contiguous(), torch.zeros(256, dtype=torch.long))


def fit(masked, epochs, **trainer_args):
    loader = DataLoader(stripes(), batch_size=32)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, **settings, **trainer_args)
    trainer.fit(masked, loader, loader)
    return trainer


def test_it_learns_and_the_network_is_kept(tmp_path):
    masked = task(lr=3e-3, warmup_epochs=1)
    before = masked.net.blocks[0].attn.qkv.weight.clone()
    trainer = fit(masked, 25, default_root_dir=tmp_path, enable_checkpointing=False)
    assert trainer.callback_metrics["val/explained_variance"] > 0.3
    assert not torch.equal(masked.net.blocks[0].attn.qkv.weight, before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = visionattn.load(tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.forward_features(images), masked.eval().net.forward_features(images))
    with pytest.raises(CheckpointError, match="not for the model 'vit_tiny_patch16_224'"):
        other = MaskedTask("vit_tiny_patch16_224", decoder_depth=1)
        other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))


def test_timms_vision_transformer():
    masked = MaskedTask("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1, "reg_tokens": 2})
    images = torch.randn(2, 3, 32, 32)
    assert masked.losses(images, torch.rand(2, 16).argsort(dim=1)).shape == (2,)
    everything = torch.arange(16).expand(2, -1)
    masked.eval()
    torch.testing.assert_close(masked.encode(images, everything), masked.net.forward_features(images))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet18", "model_args": None}, "must be a VisionTransformer"),
        ({"mask_ratio": 1.0}, "leaves 0"),
        ({"mask_ratio": 0.0}, "leaves 16"),
        ({"decoder_dim": 18}, "divisible by 4"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        task(**settings)


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "minimal_vit_micro_cifar10", "--data.dataset", "digits", "--trainer.fast_dev_run"]
    arguments += ["true", "--model.model_args", "{depth: 1}", "--trainer.accelerator", "cpu"]
    assert main([*arguments, "--data.augmentation", "none"]) == 0


def test_micro_is_of_the_size_that_ships():
    model = timm.create_model("va_minimal_vit_micro_patch4_32", num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 905_952


def test_from_the_command_line_to_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model.name", "va_minimal_vit_nano_patch7_28", "--data.dataset", "digits", "--data.batch_size", "256"]
    settings = ["--trainer.max_epochs", "1", "--model.warmup_epochs", "0", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", "minimal_vit_micro_cifar10", *words, *settings]) == 0
    model = visionattn.load(next(tmp_path.rglob("last.ckpt")))
    assert model.num_classes == 0
    assert model.patch_embed.proj.in_channels == 1
