"""Networks of other libraries as backbones: their tokens are what they themselves give."""

import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import nn

from visionattn.adapters import FunctionModel, TorchvisionModel, TransformersModel
from visionattn.errors import CheckpointError, InputError, MissingPackageError, UnknownNameError
from visionattn.opening import open_backbone
from visionattn.probe import Backbone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens(count):
    """A function of 4 x 4 patches behind `count` other tokens."""

    def function(images):
        patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
        return torch.cat(
            [patches.mean(1, keepdim=True).expand(-1, count, -1) + torch.arange(count)[:, None], patches], 1
        )

    return function


@pytest.mark.parametrize(("class_token", "registers"), [(False, 0), (True, 0), (True, 4), (False, 2)])
def test_tokens_of_a_function_are_told_apart(class_token, registers):
    function = tokens(class_token + registers)
    found = Backbone.from_callable(function, image_size=32, class_token=class_token, registers=registers)
    assert (found.layers[0].grid, found.layers[0].dim) == ((4, 4), 192)
    assert (found.layers[0].has_class, found.layers[0].num_registers) == (class_token, registers)
    (given,) = found(IMAGES)
    parts = [given.class_token[:, None]] if class_token else []
    parts += [given.registers] if registers else []
    assert torch.equal(torch.cat([*parts, given.patches], 1), function(IMAGES))


@pytest.mark.parametrize("kind", ["features", "map", "array", "module"])
def test_what_a_function_may_give(kind):
    net = nn.Conv2d(3, 6, 8, stride=8).requires_grad_(False)
    functions = {
        "features": lambda images: net(images).mean((2, 3)),
        "map": net.forward,
        "array": lambda images: net(images).numpy(),
        "module": net,
    }
    found = Backbone.from_callable(functions[kind], image_size=32, name="mine")
    (given,) = found(IMAGES)
    expected = net(IMAGES).flatten(2).transpose(1, 2)
    expected = expected.mean(1, keepdim=True) if kind == "features" else expected
    torch.testing.assert_close(given.patches, expected)
    assert found.layers[0].grid == ((1, 1) if kind == "features" else (4, 4))
    assert (found.model.name, found.channels) == ("mine", 3)


def test_functions_are_told_apart_by_their_answers():
    first, second, again = (FunctionModel(tokens(count), image_size=32).state_dict() for count in (0, 1, 0))
    assert torch.equal(first["response"], again["response"])
    assert first["response"].shape != second["response"].shape
    module = FunctionModel(nn.Conv2d(3, 4, 8), image_size=32)
    assert set(module.state_dict()) == {"function.weight", "function.bias"}


def test_a_function_says_how_its_images_are_prepared():
    model = FunctionModel(lambda images: images, image_size=24, mean=(0.2,), std=(0.3,))
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 24, 24), (0.2,), (0.3,))
    assert Backbone(model, image_size=24).channels == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "A function of images is required; got int"),
        (lambda images: "text", "must return a tensor; got str"),
        (lambda images: images.sum(), r"returns no layers .* 0-d tensor|must return"),
        (lambda images: images[:, 0, 0, 0], r"must return .B, D., .B, N, D. or .B, D, H, W."),
        (lambda images: images.new_zeros(5, 4), r"for images \(1, 3, 32, 32\); got \(5, 4\)"),
        (tokens(1), "17 patch tokens for images of 32 x 32 pixels, which form no grid"),
    ],
)
def test_what_is_no_backbone(function, message):
    with pytest.raises(InputError, match=message):
        Backbone.from_callable(function, image_size=32)


def test_a_vit_of_torchvision_gives_its_own_tokens():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48).eval()
    before = []
    hook = net.encoder.register_forward_hook(lambda module, args, output: before.append(output))
    net(IMAGES)
    hook.remove()
    found = Backbone(net, [0, -1], image_size=32)
    first, last = found(IMAGES)
    assert (found.layers[0].has_class, found.layers[0].grid) == (True, (4, 4))
    torch.testing.assert_close(torch.cat([last.class_token[:, None], last.patches], 1), before[0])
    assert not torch.equal(first.patches, last.patches)


@pytest.mark.parametrize(
    ("name", "stages", "dim"), [("resnet18", 4, 512), ("mobilenet_v3_small", 13, 576), ("regnet_y_400mf", 4, 440)]
)
def test_stages_of_torchvision_end_in_what_the_pooling_reads(name, stages, dim):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    pooled = []
    hook = net.avgpool.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    net(IMAGES)
    hook.remove()
    found = Backbone(net, range(stages), image_size=32)
    with pytest.raises(InputError, match=f"must be from 0 to {stages - 1}"):
        Backbone(net, [stages], image_size=32)
    assert found.layers[-1].dim == dim
    torch.testing.assert_close(found(IMAGES)[-1].patches, pooled[0].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert not any(key.startswith(("model.fc.", "model.classifier.")) for key in found.model.state_dict())


def test_swin_of_torchvision_has_its_channels_in_front():
    net = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4]).eval()
    found = Backbone(net, image_size=32)
    expected = net.norm(net.features(IMAGES)).flatten(1, 2)
    torch.testing.assert_close(found(IMAGES)[0].patches, expected, rtol=1e-5, atol=1e-6)


def test_names_of_torchvision(tmp_path):
    torch.manual_seed(5)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    opened = open_backbone("torchvision/resnet18", tmp_path / "net.pth")
    assert opened.source == "file net.pth"
    assert isinstance(opened.model, TorchvisionModel)
    assert torch.equal(opened.model.model.conv1.weight, net.conv1.weight)
    first, second = (open_backbone("torchvision/resnet18", random=True).model.model.conv1.weight for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(UnknownNameError, match="Did you mean torchvision/resnet18"):
        open_backbone("torchvision/resnet19", random=True)
    with pytest.raises(CheckpointError, match="needs --checkpoint FILE, since nothing is downloaded, or --random"):
        open_backbone("torchvision/resnet18")
    with pytest.raises(CheckpointError, match=r"net\.pth does not fit resnet50"):
        open_backbone("torchvision/resnet50", tmp_path / "net.pth")


def test_dinov2_with_registers_keeps_them_out_of_the_patches():
    torch.manual_seed(0)
    options = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_small_patch14_reg4_dinov2", **options).eval()
    images = torch.randn(2, 3, 28, 28)
    found = Backbone(net, image_size=28)
    (given,) = found(images)
    whole = net.forward_features(images)
    assert (found.layers[0].num_registers, found.layers[0].has_class, found.layers[0].grid) == (4, True, (2, 2))
    assert torch.equal(given.class_token, whole[:, 0])
    assert torch.equal(given.registers, whole[:, 1:5])
    assert torch.equal(given.patches, whole[:, 5:])


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
KINDS = {
    "ViTConfig": (PATCHES, True, 0),
    "DeiTConfig": (PATCHES, True, 1),
    "Dinov2Config": (PATCHES, True, 0),
    "Dinov2WithRegistersConfig": ({**PATCHES, "num_register_tokens": 4}, True, 4),
    "DINOv3ViTConfig": ({**PATCHES, "num_register_tokens": 4}, True, 4),
    "CLIPVisionConfig": (PATCHES, True, 0),
    "SiglipVisionConfig": (PATCHES, False, 0),
    "SwinConfig": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        False,
        0,
    ),
    "ConvNextConfig": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}, False, 0),
    "ResNetConfig": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        False,
        0,
    ),
}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_give_their_own_tokens(transformers, kind):
    options, has_class, registers = KINDS[kind]
    torch.manual_seed(0)
    net = transformers.AutoModel.from_config(getattr(transformers, kind)(**options)).eval()
    found = Backbone(net, [0, -1], image_size=32)
    layer = found.layers[-1]
    assert (layer.has_class, layer.num_registers) == (has_class, registers)
    net = getattr(net, "vision_model", net)
    with torch.no_grad():
        expected = net(pixel_values=IMAGES).last_hidden_state
    given = found(IMAGES)[-1]
    expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected
    torch.testing.assert_close(given.patches, expected[:, has_class + registers :])
    if has_class:
        torch.testing.assert_close(given.class_token, expected[:, 0])
    assert layer.grid[0] * layer.grid[1] == given.patches.shape[1]


def test_a_folder_of_transformers_opens_with_its_preparation(transformers, tmp_path):
    torch.manual_seed(0)
    net = transformers.AutoModel.from_config(transformers.ViTConfig(**PATCHES)).eval()
    net.save_pretrained(tmp_path / "net")
    text = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 48, "width": 48}}'
    (tmp_path / "net/preprocessor_config.json").write_text(text)
    opened = open_backbone(tmp_path / "net")
    assert opened.source == "folder net"
    config = resolve_model_data_config(opened.model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 48, 48), (0.5,) * 3, (0.5,) * 3)
    found = Backbone(opened.model, image_size=48)  # its positions are interpolated
    assert (found.layers[0].grid, found.layers[0].has_class) == ((6, 6), True)
    (tmp_path / "net/preprocessor_config.json").write_text('{"size": "large"}')
    with pytest.raises(InputError, match=r"Could not read .*preprocessor_config\.json"):
        open_backbone(tmp_path / "net")
    (tmp_path / "net/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="could not be opened by transformers"):
        open_backbone(tmp_path / "net")


def test_models_of_transformers_that_are_no_backbones(transformers):
    text = transformers.AutoModel.from_config(transformers.BertConfig(**SMALL))
    with pytest.raises(InputError, match="BertModel of transformers cannot be a backbone: it takes no images"):
        TransformersModel(text)
    hidden = transformers.AutoModel.from_config(transformers.ViTMAEConfig(**PATCHES))
    with pytest.raises(InputError, match="it hides a random part of each image"):
        TransformersModel(hidden)


def test_a_folder_of_transformers_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[transformers\]'"):
        open_backbone(tmp_path)


def test_an_array_is_taken_as_it_is():
    found = Backbone.from_callable(lambda images: np.asarray(images).mean((2, 3)), image_size=8)
    torch.testing.assert_close(found(IMAGES[:, :, :8, :8])[0].patches[:, 0], IMAGES[:, :, :8, :8].mean((2, 3)))
