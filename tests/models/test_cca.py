"""Attribute retrieval: names, conditions by name, place and pair, later attributes, backbones, files, bad input."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionattn
from tests.blocks.contract import randomise
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import CheckpointError, InputError, UnknownNameError
from visionattn.models.cca import HEADS
from visionattn.weights.cca import decode_names, encode_names

NANO = "va_cca_minimal_vit_nano_patch4_32"
ATTRIBUTES = ["colour", "kind", "season", "größe"]
# Parameters of all and of the head, and GMACs for one attribute.
COSTS = {
    "va_cca": (12_131_776, 955_264, 1.82),
    "va_cca_vit_tiny_patch16_224": (5_994_752, 470_336, 1.25),
    "va_cca_vit_small_patch16_224": (22_555_136, 889_472, 4.60),
    "va_cca_mobilenetv2_100": (3_573_888, 1_350_016, 0.30),
    "va_cca_tf_efficientnet_lite0": (4_721_024, 1_350_016, 0.39),
    "va_cca_minimal_vit_tiny_patch16_224": (5_994_752, 470_336, 1.25),
    NANO: (365_952, 58_560, 0.02),
    "va_cca_halonet_h0": (6_068_928, 823_680, 2.31),
    "va_cca_halonet_nano_32": (300_176, 215_296, 0.02),
}


def build(name=NANO, **kwargs):
    model = randomise(timm.create_model(name, **{"attributes": ATTRIBUTES, **kwargs})).eval()
    for p in model.parameters():
        p.data.mul_(0.3)
    return model, torch.randn(3, *model.pretrained_cfg["input_size"], dtype=kwargs.get("dtype"))


def test_all_names_are_there():
    assert {name for name in visionattn.models.names() if "_cca" in name} == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_costs_and_card(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    card = timm.get_pretrained_cfg(name)
    assert (count_parameters(model), count_parameters(model.head)) == COSTS[name][:2]
    assert count_macs(model, card.input_size) / 1e9 == pytest.approx(COSTS[name][2], abs=0.006)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}
    assert card.num_classes == -1
    assert f"{card.first_conv}.weight" in model.state_dict()
    assert (model.task, model.num_classes, model.attributes) == ("retrieve", 0, ("overall",))
    for wrong in ({"not_an_argument": 1}, {"num_classes": 10}):
        with pytest.raises(TypeError):
            timm.create_model(name, device="meta", **wrong)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [NANO, "va_cca_halonet_nano_32"])
def test_conditions_by_name_place_and_tensor(name, head):
    model, x = build(name, head=head, embed_dim=24, dtype=torch.float64)
    every = model(x)
    assert every.shape == (3, 4, 24)
    torch.testing.assert_close(every.norm(dim=-1), torch.ones(3, 4).double())
    places = [3, 0]
    for asked in (["größe", "colour"], places, torch.tensor(places)):
        torch.testing.assert_close(model(x, asked), every[:, places], rtol=0, atol=1e-12)
    for c, attribute in enumerate(ATTRIBUTES):
        torch.testing.assert_close(model(x, [attribute]), every[:, [c]], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.head(model.forward_tokens(x), torch.tensor(places)), every[:, places])
    pairs = [2, 2, 0]
    for asked in ([ATTRIBUTES[c] for c in pairs], torch.tensor(pairs)):
        expected = torch.stack([every[b, c] for b, c in enumerate(pairs)])
        torch.testing.assert_close(model.embed_pairs(x, asked), expected, rtol=0, atol=1e-12)


def test_tokens_are_those_of_the_backbone():
    vit, x = build()
    assert torch.equal(vit.forward_tokens(x), vit.backbone.forward_features(x))
    assert vit.forward_tokens(x).shape == (3, 65, 64)
    net, x = build("va_cca_halonet_nano_32")
    maps = net.backbone.forward_features(x)
    assert torch.equal(net.forward_tokens(x)[:, 8 * 3 + 5], maps[:, :, 3, 5])
    swin = timm.create_model("va_cca", backbone="swin_tiny_patch4_window7_224", backbone_args={"depths": (1, 1, 1, 1)})
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(swin.eval().forward_tokens(x)[:, 7 * 2 + 4], swin.backbone.forward_features(x)[:, 2, 4])


@pytest.mark.parametrize(("head", "place"), [("linear", 0), ("csn", 0), ("cca", None), ("asen", None)])
def test_class_token_is_what_plain_heads_read(head, place):
    model, _ = build(head=head)
    tokens = torch.randn(2, 9, 64)
    other = tokens.clone()
    other[:, 1:] += 1
    assert torch.equal(model.head(tokens), model.head(other)) == (place == 0)


def test_any_backbone():
    model = timm.create_model(
        "va_cca",
        backbone="test_efficientnet",
        attributes=["a", "b"],
        in_chans=1,
        head_args={"num_tokens": 2, "depth": 2},
    ).eval()
    assert model(torch.randn(2, 1, 70, 90)).shape == (2, 2, 128)
    card = timm.get_pretrained_cfg("test_efficientnet")
    assert model.pretrained_cfg["mean"] == card.mean
    assert timm.data.resolve_model_data_config(model)["mean"] == card.mean
    model = timm.create_model("va_cca_vit_tiny_patch16_224", img_size=64, backbone_args={"depth": 1}).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 128)
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("head", HEADS)
def test_a_later_attribute_leaves_old_embeddings_as_they_are(head):
    model, x = build(head=head)
    old = model(x, ATTRIBUTES).detach()
    new = model.add_attributes(["pattern", "fit"])
    assert model.attributes == (*ATTRIBUTES, "pattern", "fit")
    assert torch.equal(model(x, ATTRIBUTES), old)
    optimizer = torch.optim.AdamW(new, lr=0.1, weight_decay=0.5)
    before = model(x, ["fit"]).detach()
    model(x)[..., 0].sum().backward()
    optimizer.step()
    assert not torch.equal(model(x, ["fit"]), before)
    assert torch.equal(model(x, ATTRIBUTES), old)
    assert decode_names(model.state_dict()["attribute_names"]) == model.attributes
    assert model._model_args["attributes"] == list(model.attributes)


def test_attributes_that_cannot_be_added():
    model, _ = build(head="csn", head_args={"masks": "fixed"})
    with pytest.raises(InputError, match="all dimensions are in use"):
        model.add_attributes(["pattern"])
    with pytest.raises(InputError, match=r"different names; got .*'kind', 'season', 'größe', 'kind'"):
        model.add_attributes(["kind"])
    assert model.attributes == tuple(ATTRIBUTES)


def test_training():
    model, x = build()
    model.set_grad_checkpointing()
    model.train()(x)[..., 0].sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    decayed = model.no_weight_decay()
    assert {"backbone.cls_token", "backbone.pos_embed", "head.table.rows.0", "head.table.rows.3"} <= decayed
    assert not any(name.startswith("head.") and ".rows." not in name for name in decayed)


def test_compiles_whole():
    model, x = build()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([2, 1])
    torch.testing.assert_close(compiled(x, ids), model(x, ids))


@pytest.mark.parametrize("head", HEADS)
def test_a_file_says_what_it_is(head, tmp_path):
    model, x = build(head=head, embed_dim=32)
    model.add_attributes(["pattern"])
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    for path in (tmp_path / "weights.safetensors", tmp_path / "folder"):
        loaded = visionattn.load(path)
        assert loaded.attributes == (*ATTRIBUTES, "pattern")
        assert torch.equal(loaded(x), model(x))
    named = visionattn.load(tmp_path / "weights.safetensors", name=NANO)
    assert torch.equal(named(x), model(x))


def test_a_training_checkpoint(tmp_path):
    model, x = build("va_cca", backbone="va_minimal_vit_nano_patch4_32")
    x = x[..., :32, :32]
    hyper_parameters = {
        "name": "va_cca",
        "model_args": {
            "backbone": "va_minimal_vit_nano_patch4_32",
            "attributes": ATTRIBUTES,
            "backbone_checkpoint": "absent.safetensors",
        },
        "num_classes": None,
    }
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, tmp_path / "last.ckpt")
    assert torch.equal(visionattn.load(tmp_path / "last.ckpt")(x), model(x))


def test_weights_of_other_attributes_do_not_load():
    model, _ = build()
    other, _ = build(attributes=["colour", "kind", "season", "pattern"])
    with pytest.raises(RuntimeError, match="for the attributes colour, kind, season, größe; the model has colour,"):
        other.load_state_dict(model.state_dict())
    assert decode_names(encode_names(ATTRIBUTES)) == tuple(ATTRIBUTES)


def test_weights_of_the_backbone(tmp_path):
    backbone = timm.create_model("va_minimal_vit_nano_patch4_32")
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    model, x = build(backbone_checkpoint=tmp_path / "backbone.safetensors")
    fresh = timm.create_model(NANO, backbone_checkpoint=tmp_path / "backbone.safetensors").eval()
    assert torch.equal(fresh.forward_tokens(x), backbone.eval().forward_features(x))
    # What is saved has weights of its own: no path of this machine, and none that is looked for again.
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    arguments = json.loads((tmp_path / "folder" / "config.json").read_text())["model_args"]
    assert arguments["attributes"] == ATTRIBUTES
    assert not {"backbone_checkpoint", "pretrained_backbone"} & set(arguments)
    with pytest.raises(
        CheckpointError, match=r"does not fit va_halonet_nano_32: stem\.conv\.weight is missing; .* more"
    ):
        timm.create_model("va_cca_halonet_nano_32", backbone_checkpoint=tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="There is no file"):
        timm.create_model(NANO, backbone_checkpoint="absent.pth")


def test_imagenet_weights_in_half_precision():
    path = Path(__file__).parents[3] / "shared" / "weights" / "backbones" / "efficientnet_lite0_fp16.safetensors"
    if not path.is_file():
        pytest.skip("the folder of shared weights is not here")
    model = timm.create_model("va_cca_tf_efficientnet_lite0", backbone_checkpoint=path)
    stored = load_file(path)["conv_stem.weight"]
    assert torch.equal(model.backbone.conv_stem.weight, stored.float())


@pytest.mark.parametrize("asked", [["color"], [4], [-1], ["kind", "größ"]])
def test_unknown_attributes_are_listed(asked):
    model, x = build()
    with pytest.raises(
        UnknownNameError, match=r"This model has 'colour', 'kind', 'season', 'größe', indices 0 to 3"
    ) as e:
        model(x, asked)
    assert ("Did you mean" in str(e.value)) == isinstance(asked[-1], str)
    with pytest.raises(UnknownNameError):
        model.embed_pairs(x, [0, 1, *asked[-1:]])


def test_bad_input():
    model, x = build()
    with pytest.raises(InputError, match=r"given as a list: \['kind'\]"):
        model(x, "kind")
    with pytest.raises(InputError, match="list of attributes is empty"):
        model(x, [])
    for wrong in ([0, 1], torch.tensor([[0], [1], [2]]), None):
        with pytest.raises(InputError, match="3 images require one attribute each; got"):
            model.embed_pairs(x, wrong)
    for wrong in ("kind", [], ["kind", "kind"]):
        with pytest.raises(InputError, match="list of one or more different names"):
            timm.create_model(NANO, attributes=wrong)
    with pytest.raises(InputError, match="head must be one of 'cca', 'linear', 'csn', 'asen'; got 'mean'"):
        timm.create_model(NANO, head="mean")
