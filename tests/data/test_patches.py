"""Patches of any backbone: channels last, prefix tokens left out, at most 7 x 7."""

import pytest
import timm
import torch
from torch import nn

from visionattn.data.retrieval.patches import read_patches
from visionattn.errors import InputError


def test_patches_of_a_vit_are_its_tokens_without_the_class_token():
    model = timm.create_model("va_minimal_vit_nano_patch4_32", num_classes=0, img_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(images)
    torch.testing.assert_close(read_patches(model, images), tokens[:, model.num_prefix_tokens :])


def test_more_than_7_by_7_patches_are_averaged():
    model = timm.create_model("va_minimal_vit_nano_patch4_32", num_classes=0, img_size=56).eval()
    images = torch.randn(1, 3, 56, 56)
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    expected = tokens.unflatten(1, (7, 2, 7, 2)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(read_patches(model, images), expected)


def test_patches_of_a_convolutional_network_and_of_a_model_of_attributes():
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    found = read_patches(model, images)
    assert found.shape[:2] == (2, 4)
    embedder = timm.create_model("va_cca", backbone="test_efficientnet", attributes=["colour"]).eval()
    embedder.backbone.load_state_dict(model.state_dict())
    torch.testing.assert_close(read_patches(embedder, images), found)


def test_a_model_without_maps_is_refused():
    with pytest.raises(InputError, match="Linear gives no map of patches"):
        read_patches(nn.Linear(2, 2), torch.randn(1, 3, 8, 8))
