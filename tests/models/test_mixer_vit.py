"""`va_vit_*`: timm's ViT with any mixer."""

from __future__ import annotations

import pytest
import timm
import torch

import visionattn.models  # noqa: F401  registers the names
from visionattn.errors import InputError, UnknownNameError
from visionattn.swapping import Swapped

NANO = "va_vit_nano_patch4_32"
SIZES = {
    "va_vit_tiny_patch16_224": 5_717_416,
    "va_vit_micro_patch4_32": 906_922,
    NANO: 308_042,
    "va_vit_nano_patch7_28": 305_034,
}


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_with_softmax_it_is_timms(name, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
        reference = timm.create_model("vit_tiny_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not any(isinstance(module, Swapped) for module in model.modules())
    assert len(model.state_dict()) - 12 * len(model.blocks) == len(reference.state_dict()) - 12 * 12


def test_weights_of_timm_load(tmp_path):
    reference = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5).eval()
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    model = timm.create_model(
        "va_vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        num_classes=5,
        mixer="gated_heads",
        checkpoint_path=str(tmp_path / "timm.pth"),
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)


def test_every_second_block_and_settings():
    model = timm.create_model(NANO, mixer="hsa", mixer_every=2, mixer_args={"windows": 4})
    assert [isinstance(block.attn, Swapped) for block in model.blocks] == [True, False] * 3
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (UnknownNameError, {"mixer": "agents"}, "did you mean 'agent'"),
        (InputError, {"mixer": "hsa", "mixer_args": {"window": 4}}, "'hsa' does not take window"),
        (InputError, {"mixer": "hsa", "mixer_every": 0}, "every must be at least 1"),
    ],
)
def test_wrong_settings(error, settings, message):
    with pytest.raises(error, match=message):
        timm.create_model(NANO, **settings)
