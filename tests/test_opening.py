"""One rule for what a model can be named by: names, files, folders, modules; and one set of messages."""

import pytest
import timm
import torch

import visionattn
from visionattn.errors import CheckpointError, InputError, UnknownNameError
from visionattn.opening import has_weights, is_file, open_model

SMALL = "va_minimal_vit_nano_patch7_28"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(SMALL, num_classes=3)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    return path, model.state_dict()


def equal(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def test_a_name_with_weights():
    found = open_model("va_span_ch26_x4", task="restore")
    assert found.source.startswith("va_span_ch26_x4, ")
    assert found.licence
    assert not found.model.training
    assert equal(found.model, timm.create_model("va_span_ch26_x4", True).state_dict())


def test_a_file_and_a_file_for_a_name(weights):
    path, state = weights
    for found in (open_model(path), open_model(SMALL, path, num_classes=3), open_model(None, path)):
        assert found[1:] == ("file weights.pt", None)
        assert not found.model.training
        assert equal(found.model, state)


def test_without_its_classifier(weights):
    path, state = weights
    model = open_model(SMALL, path, drop_classifier=True).model
    assert model.num_classes == 0
    assert equal(model, {key: value for key, value in state.items() if not key.startswith("head.")})


def test_a_module_stays_as_it_is():
    model = torch.nn.Linear(1, 1)
    assert open_model(model) == (model, "as given", None)


def test_random_weights_are_always_the_same():
    state = torch.get_rng_state()
    first, second = (open_model(SMALL, random=True) for _ in range(2))
    assert first.source == "random"
    assert equal(first.model, second.model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_models_of_fixed_size_are_built_for_the_images():
    assert open_model("vit_tiny_patch16_224", random=True, image_size=32).model.patch_embed.img_size == (32, 32)
    assert open_model("resnet10t", random=True, image_size=32).source == "random"


def test_what_is_a_file(tmp_path):
    assert is_file(tmp_path)
    assert is_file("none.safetensors")
    assert not is_file(SMALL)
    assert has_weights("va_span_ch26_x4")
    assert has_weights("hf-hub:a/b")
    assert not has_weights(SMALL)


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ("va_minimal_vit_nan", {}, UnknownNameError, "There is no model 'va_minimal_vit_nan'. Did you mean va_"),
        ("resnet18.none", {}, UnknownNameError, "Leave out the part after the dot for the default weights"),
        (SMALL, {}, CheckpointError, f"No weights are published for {SMALL}: give a weight file"),
        ("none.pt", {}, CheckpointError, "none.pt"),
        ("none.onnx", {}, CheckpointError, "none.onnx is an ONNX file: a weight file"),
        (SMALL, {"checkpoint": "a.onnx"}, CheckpointError, "a.onnx is an ONNX file"),
        (None, {}, InputError, "A model is required"),
        (SMALL, {"checkpoint": "a.pt", "random": True}, InputError, "leave out --random or --checkpoint"),
        ("none.pt", {"checkpoint": "a.pt", "num_classes": 3}, InputError, "leave out --checkpoint and --num-classes"),
        (torch.nn.Identity(), {"random": True}, InputError, "Identity is a model with its weights: leave out --random"),
        ("va_span_ch26_x4", {"task": "stereo"}, InputError, "it is a 'restore' model; a 'stereo' model is required"),
        (
            torch.nn.Identity(),
            {"task": "flow"},
            InputError,
            "Identity cannot be used here: it states no task; a 'flow'",
        ),
        (SMALL, {"task": ("flow", "stereo"), "random": True}, InputError, "a 'flow' or 'stereo' model is required"),
    ],
)
def test_mistakes(model, settings, error, message):
    with pytest.raises(error) as caught:
        open_model(model, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_loaded_for_another_task(monkeypatch):
    monkeypatch.setattr(visionattn.opening, "load", None)
    with pytest.raises(InputError):
        open_model("va_span_ch26_x4", task="flow")
