"""What a checkpoint says of its model: written, read back, and read of files from before there were cards."""

import pytest
import torch

import visionattn
from visionattn.card import KEY, Card
from visionattn.checkpoints import create, load, read_card
from visionattn.errors import CheckpointError, ConfigError

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


def hyper_parameters(**entries):
    known = {"_class_path": "visionattn.train.classify.ClassifyTask", "name": NAME, "model_args": {"depth": 1}}
    return {"hyper_parameters": {**known, "num_classes": 3, **entries}}


def endless():
    nested = {}
    nested["again"] = nested
    return nested


def deep(levels=100):
    nested = {}
    for _ in range(levels):
        nested = {"x": nested}
    return nested


GOOD = {"format": 1, "name": NAME, "model_args": {"depth": 1, "num_classes": 3}, "config": {}, "task": "classify"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (hyper_parameters(name=None), "its name must be a str, but is None"),
        (hyper_parameters(name=7), "its name must be a str, but is 7"),
        (hyper_parameters(name="x" * 10**6), "a text of 1,000,000 characters"),
        (hyper_parameters(name="va_no_such_model"), "'va_no_such_model', which does not exist"),
        (hyper_parameters(name="hf-hub:somebody/secret"), "does not exist. Weight files are loaded without fetching"),
        (hyper_parameters(model_args=[1]), r"its model_args must be a dict, but is \[1\]"),
        (hyper_parameters(model_args={1: 2}), "one of its keys is not a text: 1"),
        (hyper_parameters(model_args=deep()), "nested too deeply"),
        (hyper_parameters(model_args=endless()), "nested too deeply"),
        (hyper_parameters(model_args={"depth": torch.ones(1)}), "it holds a Tensor"),
        (hyper_parameters(model_args={"depth": 60_000}), "far larger than the file's weights"),
        (hyper_parameters(model_args={"embed_dim": 10**7 // 3 * 3}), "far larger|does not fit"),
        (hyper_parameters(model_args={"depth": 10**15}), "arguments hold the number 1e"),
        (hyper_parameters(model_args={"no_such": 1}), "does not take one of these arguments"),
        (hyper_parameters(model_args={"depth": "many"}), "cannot be built with .*depth='many'"),
        (hyper_parameters(model_args={"norm_layer": "hf-hub:x/y"}), "names 'hf-hub:x/y' as a part of its model"),
        ({KEY: [1]}, "it is a list, not a dictionary"),
        ({KEY: {**GOOD, "format": 2}}, "its format is 2, and this version reads 1"),
        ({KEY: {**GOOD, "config": {"mean": [0.5, float("nan"), 0.5]}}}, "mean must be finite numbers"),
        ({KEY: {**GOOD, "config": {"std": [0.0]}}}, "std must be finite numbers, above 0"),
        ({KEY: {**GOOD, "config": {"input_size": [3, -1, 28]}}}, "input_size must be channels, height and width"),
        ({KEY: {**GOOD, "config": {"input_size": [1, 28, 28], "mean": [0.1] * 3}}}, "mean has 3 values for 1 channels"),
        ({KEY: {**GOOD, "config": {"crop_pct": 7}}}, "crop_pct must be above 0"),
        ({KEY: {**GOOD, "config": {"interpolation": "magic"}}}, "interpolation must be one of"),
        (
            {KEY: {**GOOD, "config": {"input_size": [3, 28, 28]}}},
            "is for images of 3 x 28 x 28, but its model takes 1 x 28",
        ),
    ],
)
def test_damaged_and_hostile_checkpoints_are_one_line(tmp_path, entries, message):
    model = create(NAME, depth=1, num_classes=3)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(write(tmp_path / "x.ckpt", model, **entries))
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[1], "text", {"name": "experiment 7", "lr": 0.1}, {"lr": 0.1}])
def test_hyper_parameters_of_other_projects_leave_the_weights_to_speak(tmp_path, given):
    model = create(NAME)
    loaded = load(write(tmp_path / "x.ckpt", model, hyper_parameters=given), NAME)
    assert loaded.pretrained_cfg["architecture"] == NAME


def test_sources_of_weights_are_left_out(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("Something was fetched.")

    monkeypatch.setattr("socket.create_connection", fetch)
    monkeypatch.setattr("socket.getaddrinfo", fetch)
    args = {
        "depth": 1,
        "pretrained": True,
        "checkpoint_path": "https://example.org/x.pth",
        "pretrained_cfg_overlay": {"url": "https://example.org/x.pth"},
    }
    model = create(NAME, depth=1, num_classes=3)
    entries = hyper_parameters(model_args=args, pretrained=True)
    loaded = load(write(tmp_path / "x.ckpt", model, **entries))
    assert torch.equal(loaded.state_dict()["head.weight"], model.state_dict()["head.weight"])
    hosted = hyper_parameters(name="hf-hub:timm/test_vit.r160_in1k", model_args={})
    other = create("test_vit", num_classes=3)
    assert load(write(tmp_path / "y.ckpt", other, **hosted)).pretrained_cfg["architecture"] == "test_vit"
