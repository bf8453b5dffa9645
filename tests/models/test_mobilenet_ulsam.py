"""MobileNets with subspace attention: timm's networks without it, the paper's numbers, where it stands, any size."""

import pytest
import timm
import torch
from torch import nn

from visionattn.blocks import SubspaceAttention
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError
from visionattn.models.mobilenet_ulsam import VARIANTS

SMALL = "va_mobilenetv2_ulsam_050_32"
# Counted; then what the paper prints, in millions, and the base (parameters, MACs in millions) that its row refers to.
COSTS = {
    "va_mobilenetv1_ulsam_100": (3_964_200, 516_657_664, 3.9, 517, None),
    "va_mobilenetv1_ulsam_075": (2_433_880, 295_972_224, 2.4, 296, None),
    "va_mobilenetv1_ulsam_050": (1_263_240, 136_300_800, 1.2, 136, None),
    "va_mobilenetv2_ulsam_100": (3_067_112, 262_659_328, 2.97, 261.88, (3.4, 300)),
    "va_mobilenetv2_ulsam_100_96": (3_386_792, 278_119_808, 3.28, 277.34, (3.4, 300)),
    "va_mobilenetv2_ulsam_100_160": (3_185_192, 285_313_792, 3.08, 284.54, (3.4, 300)),
    "va_mobilenetv2_ulsam_100_64_96": (3_332_648, 267_833_728, 3.23, 267.06, (3.4, 300)),
    "va_mobilenetv2_ulsam_100_2x160": (2_865_512, 269_853_312, 2.77, 269.08, (3.4, 300)),
    "va_mobilenetv2_ulsam_100_2x96_2x160": (2_629_352, 224_544_384, 2.54, 223.77, (3.4, 300)),
}


def attentions(model: nn.Module) -> dict[str, SubspaceAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceAttention)}


def test_every_variant_has_its_costs():
    assert set(COSTS) == set(VARIANTS) - {SMALL}


@pytest.mark.parametrize(("name", "costs"), COSTS.items())
def test_costs(name, costs):
    model = timm.create_model(name, device="meta")
    parameters, macs, printed_parameters, printed_macs, base = costs
    assert count_parameters(model) == parameters
    assert count_macs(model, (3, 224, 224)) == macs
    if base:  # the paper's rows are differences to a rounded base
        whole = timm.create_model(name, places=(), device="meta")
        parameters += 1e6 * base[0] - count_parameters(whole)
        macs += 1e6 * base[1] - count_macs(whole, (3, 224, 224))
    assert parameters / 1e6 == pytest.approx(printed_parameters, abs=0.1 if base is None else 0.02)
    assert macs / 1e6 == pytest.approx(printed_macs, abs=0.5 if base is None else 0.006)


@pytest.mark.parametrize(
    ("name", "base"), [("va_mobilenetv1_ulsam_100", "mobilenetv1_100"), ("va_mobilenetv2_ulsam_100", "mobilenetv2_100")]
)
@torch.no_grad()
def test_without_places_it_is_timms_network(name, base):
    ours, theirs = timm.create_model(name, places=()).eval(), timm.create_model(base).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("mode", "inserted"), [("replace", "blocks.4.2"), ("add", "blocks.4.2.1")])
@torch.no_grad()
def test_modes(mode, inserted):
    model = timm.create_model(SMALL, mode=mode, num_subspaces=8, gain="scaled").eval()
    assert list(attentions(model)) == [inserted, inserted.replace("4.2", "5.2")]
    assert [block.point.shape for block in attentions(model).values()] == [(8, 6), (8, 10)]
    whole = timm.create_model(SMALL, places=(), device="meta")
    if mode == "add":
        assert count_parameters(model) == count_parameters(whole) + 2 * (48 + 80)
    assert all(block.scaled for block in attentions(model).values())


def test_places():
    model = timm.create_model("va_mobilenetv2_ulsam_100", places=(3, 9, 17), mode="add", device="meta")
    assert {name: block.scale.numel() for name, block in attentions(model).items()} == {
        "blocks.1.1.1": 24,
        "blocks.3.2.1": 64,
        "blocks.6.0.1": 320,
    }


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        (
            "va_mobilenetv2_ulsam_100",
            {"places": (12, 14)},
            r"places of mode 'replace' must be among 3, 5, 6, 8, 9, 10, 12, 13, 15, 16; got \(12, 14\)",
        ),
        ("va_mobilenetv1_ulsam_100", {"places": (1,)}, "must be among 3, 5, 7, 8, 9, 10, 11, 13"),
        ("va_mobilenetv1_ulsam_100", {"places": (14,), "mode": "add"}, "places of mode 'add' must be among 1, 2"),
        ("va_mobilenetv2_ulsam_100", {"mode": "delete"}, "must be one of 'replace', 'add'; got 'delete'"),
        ("va_mobilenetv2_ulsam_100", {"num_subspaces": 5, "places": (13,)}, "divisible by num_subspaces"),
    ],
)
def test_wrong_settings_are_named(name, settings, text):
    with pytest.raises(InputError, match=text):
        timm.create_model(name, device="meta", **settings)


@pytest.mark.parametrize("size", [(1, 1), (33, 57), (40, 24)])
@torch.no_grad()
def test_any_size(size):
    model = timm.create_model(SMALL, form="module").eval()
    maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    for features, info in zip(maps, model.feature_info):
        assert features.shape[1:] == (info["num_chs"], *(-(-pixels // info["reduction"]) for pixels in size))
    assert torch.isfinite(model(torch.randn(2, 3, *size))).all()


def test_module_form_trains():
    model = timm.create_model(SMALL, form="module", mode="add").train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
