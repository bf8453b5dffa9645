"""`visionattn.load`: which model does a weight file belong to?"""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn
from tests.models.contract import build
from visionattn.errors import CheckpointError, ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("va_minimal_vit_nano_patch7_28", {}),
        ("va_minimal_vit_nano_patch4_32_minimum", {"num_classes": 3}),
        ("va_minimal_vit_nano_patch4_32", {"in_chans": 5, "num_classes": 0}),
        ("va_minimal_vit_tiny_patch16_224_symmetric_minimum", {}),
    ],
)
def test_model_is_known_by_its_shapes(tmp_path, name, arguments):
    model, _ = build(name, **arguments)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = visionattn.load(tmp_path / "weights.safetensors")
    assert loaded.pretrained_cfg["architecture"] == name
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_timms_vit_tiny_is_our_baseline(tmp_path):
    torch.save({"model": timm.create_model("vit_tiny_patch16_224").state_dict()}, tmp_path / "deit.pth")
    assert visionattn.load(tmp_path / "deit.pth").pretrained_cfg["architecture"] == "va_minimal_vit_tiny_patch16_224"


def test_twins_need_a_name(tmp_path):
    name = "va_minimal_vit_tiny_patch16_224_shared"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"fits several models: .*_collapsed, .*_shared"):
        visionattn.load(tmp_path / "w.pt")
    assert visionattn.load(tmp_path / "w.pt", name=name).blocks[0].attn.similarity == "shared"


def test_a_foreign_file_names_what_does_not_fit(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"fits no model of this package. Nearest: .* is .*, not"):
        visionattn.load(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"does not fit va_minimal_vit_nano_patch7_28: .* and \d+ more"):
        visionattn.load(tmp_path / "w.pt", name="va_minimal_vit_nano_patch7_28")


def test_a_file_of_no_family_is_compared_with_every_name(tmp_path, monkeypatch):
    names = ["va_span_ch26_x2", "va_halonet_nano_32"]
    monkeypatch.setattr("visionattn.checkpoints.by_shapes.models.names", lambda: names)
    torch.save({"lost.weight": torch.zeros(2, 3)}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"fits no model of this package. Nearest: it does not fit va_span_ch26_x2"
    ):
        visionattn.load(tmp_path / "w.pt")


def test_a_head_of_probing_is_not_a_model():
    head = Path(__file__).parents[1] / "old_files/heads/gap-layer0.safetensors"
    with pytest.raises(CheckpointError, match=r"is a head of `visionattn probe`.*--head FILE"):
        visionattn.load(head)


def test_a_training_checkpoint_says_what_it_is(tmp_path):
    model, x = build("va_minimal_vit_nano_patch7_28", depth=2, num_classes=4)
    hyper_parameters = {
        "name": "va_minimal_vit_nano_patch7_28",
        "model_args": {"depth": 2},
        "num_classes": 4,
        "in_chans": None,
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, tmp_path / "last.ckpt")
    assert torch.equal(visionattn.load(tmp_path / "last.ckpt")(x), model(x))


def test_bad_names_folders_and_arguments(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean va_minimal_vit_nano_patch7_28"):
        visionattn.checkpoints.create("va_minimal_vit_nano_patch7")
    with pytest.raises(ConfigError, match=r"does not take one of these arguments: .*heads"):
        visionattn.checkpoints.create("va_minimal_vit_nano_patch7_28", heads=3)
    with pytest.raises(CheckpointError, match="no config"):
        visionattn.load(tmp_path)


@pytest.mark.parametrize("name", ["va_span_ch26_x2", "va_minimal_vit_tiny_patch16_224_symmetric_nomlp"])
@pytest.mark.parametrize("assign", [False, True])
def test_buffers_that_no_file_has_are_made_again(name, assign):
    model, x = build(name)
    with torch.device("meta"):
        empty = timm.create_model(name)
    if not assign:
        empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            buffer.fill_(3)
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty.eval()(x), model(x))


def test_counters_of_batch_norm_may_be_missing(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 64, 64)
    loaded = visionattn.load(tmp_path / "w.safetensors", "test_resnet", num_classes=3)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged_are_refused(tmp_path, value):
    model, _ = build("va_minimal_vit_nano_patch7_28")
    model.head.weight.data[0, 0] = value
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt holds NaN or infinite values.*head\.weight"):
        visionattn.load(tmp_path / "w.pt", "va_minimal_vit_nano_patch7_28")
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite values"):
        visionattn.checkpoints.create("va_minimal_vit_nano_patch7_28", checkpoint_path=tmp_path / "w.pt")


@pytest.mark.parametrize("config", [[1], {}, {"architecture": 3}, {"architecture": "va_span_ch26_x2", "model_args": 3}])
def test_folders_that_save_for_hf_did_not_write(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"The model 'local-dir:.*' could not be loaded"):
        visionattn.load(tmp_path)
    for name in ("local-dir:", "hf-hub:  "):
        with pytest.raises(UnknownNameError, match="names nothing"):
            visionattn.checkpoints.create(name)


def test_zero_element_tensors_do_not_build_a_giant(tmp_path):
    state = timm.create_model("va_match_stereo_nano").state_dict()
    for stage in range(4):
        for key in list(state):
            if key.startswith(f"encoder.stages.{stage}."):
                state[key] = torch.empty(10**7, 0)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"far larger than the file|does not fit"):
        visionattn.load(tmp_path / "w.pt")


@pytest.mark.parametrize("damage", [{"head.proj.weight": None}, {"attribute_names": torch.ones(3)}])
def test_damaged_retrieval_weights(tmp_path, damage):
    state = timm.create_model("va_cca", backbone="test_vit", attributes=["colour"], embed_dim=8).state_dict()
    state = {key: damage.get(key, value) for key, value in state.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt: .*(of its head are missing|attribute_names is damaged)"):
        visionattn.load(tmp_path / "w.pt")


def test_without_the_classifier_a_name_is_needed(tmp_path):
    name = "va_minimal_vit_nano_patch7_28"
    model, x = build(name, num_classes=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = visionattn.load(tmp_path / "w.safetensors", name, drop_classifier=True)
    assert torch.equal(loaded(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pytest.raises(CheckpointError, match="drop_classifier requires the name of the model"):
        visionattn.load(tmp_path / "w.safetensors", drop_classifier=True)
