"""What a checkpoint says of its model: written, read back, and read of files from before there were cards."""

import pytest
import torch

import visionattn
from visionattn.card import KEY, Card
from visionattn.checkpoints import create, load, read_card

NAME = "va_minimal_vit_nano_patch7_28"
CONFIG = {
    "input_size": [3, 42, 42],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.9, 0.8, 0.7],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "label_names": ["cat", "dog", "emu"],
}


def write(path, model, **entries):
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", **entries}, path)
    return path


def describe(model):
    return {key: model.pretrained_cfg[key] for key in CONFIG}


def expect(config):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def test_a_card_travels_with_the_checkpoint(tmp_path):
    model = create(NAME, img_size=42, in_chans=3, num_classes=3, depth=2)
    card = Card.of(model, CONFIG)
    assert card.task == "classify"
    loaded = load(write(tmp_path / "best.ckpt", model, **{KEY: card.to_dict()}))
    assert describe(loaded) == expect(CONFIG)
    assert loaded.default_cfg == loaded.pretrained_cfg
    x = torch.randn(2, 3, 42, 42)
    assert torch.equal(loaded(x), model.eval()(x))
    assert read_card(tmp_path / "best.ckpt").version == visionattn.__version__


def test_a_checkpoint_of_before_says_the_same(tmp_path):
    model = create(NAME, img_size=42, in_chans=3, num_classes=3, depth=2)
    entries = {
        "hyper_parameters": {
            "_class_path": "visionattn.train.classify.ClassifyTask",
            "name": NAME,
            "model_args": {"depth": 2, "img_size": 42},
            "num_classes": 3,
            "in_chans": 3,
            "pretrained": False,
        },
        "datamodule_hyper_parameters": {
            "dataset": "folder",
            "image_size": None,
            "mean": CONFIG["mean"],
            "std": CONFIG["std"],
            "augmentation": "none",
        },
        "ClassifyData": {"class_names": CONFIG["label_names"]},
    }
    found = describe(load(write(tmp_path / "best.ckpt", model, **entries)))
    # The model's own, which training used.
    assert found == {**expect(CONFIG), "interpolation": "bicubic", "crop_pct": 1.0}


@pytest.mark.parametrize(("size", "crop_mode"), [([20, 20], "center"), ([16, 24], "center")])
def test_a_retrieval_checkpoint_of_before_says_its_size(tmp_path, size, crop_mode):
    model = create("va_cca", backbone="resnet18", attributes=["colour"], embed_dim=8)
    entries = {
        "hyper_parameters": {
            "name": "va_cca",
            "model_args": {"backbone": "resnet18", "attributes": ["colour"], "embed_dim": 8},
            "attributes": {"colour": ["red", "blue"]},
        },
        "datamodule_hyper_parameters": {"layout": "table", "image_size": size},
    }
    loaded = load(write(tmp_path / "best.ckpt", model, **entries))
    assert loaded.pretrained_cfg["input_size"] == (3, *size)
    assert loaded.pretrained_cfg["crop_pct"] == 1.0
    assert loaded.attributes == ("colour",)
