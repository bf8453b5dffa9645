"""The backbone: tokens as the model itself computes them, the kinds kept apart."""

import pytest
import timm
import torch

from tests.probe.stores import vit
from visionattn.errors import InputError
from visionattn.probe.tokens.backbone import Backbone


def small(name, size, **options):
    return timm.create_model(name, **options).eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("reg_tokens", "class_token"), [(0, True), (4, True), (4, False), (0, False)])
def test_a_vit_gives_its_own_tokens_apart(dtype, reg_tokens, class_token):
    model = vit(reg_tokens, class_token).to(dtype)
    found = Backbone(model, image_size=32)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    (tokens,) = found(images)
    expected = model.forward_features(images)
    assert found.layers[0].has_class is class_token
    assert found.layers[0].num_registers == reg_tokens
    assert found.layers[0].grid == (4, 4)
    parts = [tokens.class_token.unsqueeze(1)] if class_token else []
    parts += [tokens.registers] if reg_tokens else []
    assert torch.equal(torch.cat([*parts, tokens.patches], 1), expected)
    assert not tokens.patches.requires_grad
    assert not tokens.patches.is_inference()


def test_layers_in_the_order_asked_before_and_after_the_norm():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    after = Backbone(model, [-1, 0, 1], image_size=32)
    before = Backbone(model, [-1, 0, 1], norm=False, image_size=32)
    assert [layer.name for layer in after.layers] == ["blocks.2", "blocks.0", "blocks.1"]
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    for index, raw, normed in zip((2, 0, 1), before(images), after(images)):
        assert torch.equal(raw.patches, outputs[index][:, 1:])
        assert torch.equal(raw.class_token, outputs[index][:, 0])
        torch.testing.assert_close(normed.patches, model.norm(outputs[index])[:, 1:])


def test_a_non_square_image_is_read_row_by_row():
    model = vit(img_size=(16, 40))
    found = Backbone(model, image_size=(16, 40))
    images = torch.randn(2, 3, 16, 40)
    assert found.layers[0].grid == (2, 5)
    maps = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)[0]
    assert torch.equal(found(images)[0].patches, maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "size", "layers", "dims"),
    [
        ("convnext_atto", 64, [0, -1], [40, 320]),  # (B, C, H, W)
        ("test_mambaout", 64, [0, -1], [16, 64]),  # (B, H, W, C)
        ("resnet10t", 64, [0, 2, -1], [64, 128, 512]),
        ("efficientnet_lite0", 64, [0, -1], [16, 1280]),  # a convolution behind the last stage
        ("va_halonet_nano_32", 32, [-1], [128]),
    ],
)
def test_maps_become_the_tokens_of_forward_features(name, size, layers, dims):
    model, images = small(name, size)
    found = Backbone(model, layers, image_size=size)
    assert [layer.dim for layer in found.layers] == dims
    tokens = found(images)
    for layer, one in zip(found.layers, tokens):
        assert one.patches.shape == (2, layer.grid[0] * layer.grid[1], layer.dim)
        assert one.class_token is None
        assert one.registers is None
    expected = model.forward_features(images.contiguous(memory_format=torch.channels_last))
    flat = expected.flatten(1, 2) if name == "test_mambaout" else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[-1].patches, flat, rtol=1e-5, atol=1e-6)


def test_our_vit_keeps_its_class_token_apart():
    model, images = small("va_minimal_vit_nano_patch4_32_minimum", 32)
    (tokens,) = Backbone(model, image_size=32)(images)
    assert torch.equal(torch.cat([tokens.class_token[:, None], tokens.patches], 1), model.forward_features(images))


def test_the_backbone_stands_still():
    model, images = small("resnet10t", 64, drop_rate=0.5)
    found = Backbone(model, image_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = found(images)[0].patches
    model.train()
    assert torch.equal(found(images)[0].patches, first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_computes_in_the_given_dtype():
    model = vit()
    (tokens,) = Backbone(model, norm=False, image_size=32, autocast=torch.bfloat16)(torch.randn(2, 3, 32, 32))
    (exact,) = Backbone(model, norm=False, image_size=32)(torch.randn(2, 3, 32, 32))
    assert not torch.equal(tokens.patches, exact.patches)
    assert tokens.patches.float().isfinite().all()


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda: torch.nn.Linear(3, 3), {}, "no forward_intermediates"),
        (vit, {"layers": [3]}, "must be from 0 to 2"),
        (vit, {"layers": []}, "must be from 0 to 2"),
        (vit, {"image_size": 40}, "40 x 40 pixels"),
        (lambda: timm.create_model("hiera_tiny_224"), {"image_size": 224}, "norm=False"),
    ],
)
def test_what_cannot_be_probed(build, options, words):
    with pytest.raises(InputError, match=words):
        Backbone(build(), **{"image_size": 32, **options})


def test_a_backbone_without_patches():
    model = vit()
    model.forward_intermediates = lambda x, indices=None, norm=False, output_fmt="", intermediates_only=False: (
        [x.mean((2, 3))] if intermediates_only else (None, [x.mean((2, 3))])
    )
    with pytest.raises(InputError, match="no patch tokens"):
        Backbone(model, image_size=32)


def test_images_of_another_size():
    with pytest.raises(InputError, match=r"\(B, C, 32, 32\)"):
        Backbone(vit(), image_size=32)(torch.zeros(1, 3, 40, 40))
