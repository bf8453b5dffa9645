"""A weight file of a read-out alone gets the backbone that it was trained on."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionattn
from visionattn.errors import CheckpointError
from visionattn.weights import SHIPPED
from visionattn.weights.minimal_vit import READ_OUT

BACKBONE, NAME = "va_minimal_vit_micro_patch4_32", "va_minimal_vit_micro_patch4_32_ep"


def test_shipped_network_is_the_shipped_backbone_with_a_read_out():
    assert set(load_file(SHIPPED / f"{NAME}.safetensors")) == READ_OUT
    whole = timm.create_model(NAME, pretrained=True).state_dict()
    backbone = timm.create_model(BACKBONE, pretrained=True).state_dict()
    assert set(whole) == set(backbone) | READ_OUT
    assert all(torch.equal(whole[key], backbone[key]) for key in backbone)


def test_number_of_classes_can_change():
    model = timm.create_model(NAME, pretrained=True, num_classes=3)
    assert torch.equal(model.attn_pool.queries, timm.create_model(NAME, pretrained=True).attn_pool.queries)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_other_incomplete_files_are_refused(tmp_path):
    state = load_file(SHIPPED / f"{NAME}.safetensors")
    del state["head.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        visionattn.load(tmp_path / "part.safetensors", NAME)
