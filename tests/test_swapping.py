"""Other mixers in timm's transformers: ten families, resolutions, weights, training, export, undoing."""

import copy
import io
import pickle

import pytest
import timm
import torch

import visionattn
from visionattn.errors import InputError, UnknownNameError
from visionattn.swapping import Swapped

FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_base_patch16_clip_224",
    "beit_base_patch16_224",
    "va_minimal_vit_micro_patch4_32",
]


def create(name: str, size: int | None = None, depth: int = 2, **kwargs) -> torch.nn.Module:
    """A small network of a family, with drawn weights that leave no branch at zero."""
    torch.manual_seed(0)
    if not name.startswith("va_"):
        kwargs |= {"depth": depth, "img_size": size or 64}
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for module in model.modules():
        if hasattr(module, "gamma_1") and isinstance(module.gamma_1, torch.nn.Parameter):
            torch.nn.init.ones_(module.gamma_1)
        if hasattr(module, "gamma") and isinstance(module.gamma, torch.nn.Parameter):
            torch.nn.init.ones_(module.gamma)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 5:
            torch.nn.init.normal_(module.weight, std=0.1)
    return model


def images(model, size: int = 64, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = 32 if "Minimal" in type(model).__name__ else size
    return torch.randn(batch, 3, size, size, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_families(name):
    model = create(name)
    x = images(model)
    keys = set(model.state_dict())
    with torch.no_grad():
        before = model(x)
        visionattn.swap(model, "softmax")
        assert sum(isinstance(m, Swapped) for m in model.modules()) == len(model.blocks)
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-6)
        heads = model.blocks[0].attn.num_heads
        visionattn.swap(model, "moh", shared_heads=0, routed_heads=heads)
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-5)  # routers start at zero
        assert {key for key in set(model.state_dict()) - keys if ".mixer." not in key} == set()
        if name.startswith("beit"):
            return
        visionattn.swap(model, "window", kernel=3)
        assert (model(x) - before).abs().max() > 1e-6
        assert set(model.state_dict()) == keys


def test_zero_starts_are_the_model():
    model = create("vit_tiny_patch16_224")
    x = images(model)
    before = model(x)
    for mixer in ("parallax", "softmax_conv", "gated_heads"):
        savings = visionattn.swap(model, mixer)
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-6)
        assert savings.parameters_after > sum(p.numel() for n, p in model.named_parameters() if ".mixer." not in n)


def test_hybrids_and_patterns():
    model = create("vit_tiny_patch16_224", depth=5)
    visionattn.swap(model, "mean", every=2)
    assert [isinstance(block.attn, Swapped) for block in model.blocks] == [True, False, True, False, True]
    visionattn.swap(model, "hsa", where="blocks.1.attn")
    assert len(model.patch_embed._forward_hooks) == 1
    model = create("vit_tiny_patch16_224", depth=5)
    visionattn.swap(model, "mean", where="blocks.[34].attn")
    assert [isinstance(block.attn, Swapped) for block in model.blocks] == [False, False, False, True, True]


def test_savings_are_those_of_the_mechanism():
    model = create("vit_tiny_patch16_224", size=224)
    savings = visionattn.swap(model, "mean")
    assert savings.macs_before - savings.macs_after == 2 * 2 * 197**2 * 192
    assert savings.parameters_after == savings.parameters_before


QUICK = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
)
def test_other_resolutions(name):
    if name.startswith("beit"):
        cases = [(side, side, "softmax", {}, {"size": 16 * side}) for side in (4, 8)]  # no other size than its own
    else:
        settings = {} if name.startswith("va_") else {"size": 112, "dynamic_img_size": True}
        # Windows of one token are softmax attention.
        cases = [(height, width, "hsa", {"windows": 1}, settings) for height, width in [(3, 5), (6, 4)]]
    for height, width, mixer, arguments, settings in cases:
        model, plain = create(name, **settings), create(name, **settings)
        visionattn.swap(model, mixer, **arguments)
        patch = model.patch_embed.patch_size[0]
        x = torch.randn(1, 3, height * patch, width * patch)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=5e-6)


def test_state_dicts_of_before_and_after():
    model = create("vit_tiny_patch16_224")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    visionattn.swap(model, "parallax")
    assert not model.load_state_dict(before).missing_keys
    after = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    assert "blocks.0.attn.mixer.r.weight" in after
    model.load_state_dict(after)
    assert torch.equal(model.blocks[0].attn.mixer.r.weight, after["blocks.0.attn.mixer.r.weight"])


def test_the_layer_stays_the_same_object():
    model = create("vit_tiny_patch16_224").train()
    layer, weight, seen = model.blocks[0].attn, model.blocks[0].attn.qkv.weight, []
    layer.register_forward_hook(lambda *args: seen.append(1))
    visionattn.swap(model, "hsa", windows=2)
    assert model.blocks[0].attn is layer
    assert layer.qkv.weight is weight
    assert layer.training
    seen.clear()
    model(images(model))
    assert seen == [1]


def test_copies_and_files():
    model = create("vit_tiny_patch16_224")
    visionattn.swap(model, "window", kernel=3)
    x = images(model)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(
    ("mixer", "settings"),
    [("window", {"kernel": 3}), ("agent", {"num_agents": 4}), ("moh", {"shared_heads": 0, "routed_heads": 2})],
)
def test_training_step(mixer, settings):
    model = create("vit_tiny_patch16_224").train()
    visionattn.swap(model, mixer, **settings)
    x = images(model)
    loss = model(x).square().mean()
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
    assert all(gradient.any() for name, gradient in plain.items() if "blocks.0.attn.mixer." in name)
    model.zero_grad()
    model.set_grad_checkpointing()  # the recomputation must take the mixer too
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_compiles_whole():
    model = create("vit_tiny_patch16_224", depth=1)
    visionattn.swap(model, "hsa", windows=2)
    x = images(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mixer", "settings"),
    [
        ("vit_tiny_patch16_224", "window", {"kernel": 3}),
        ("vit_tiny_patch16_224", "hsa", {"windows": 2}),
        ("vit_tiny_patch16_224", "agent", {}),
        pytest.param("eva02_tiny_patch14_224", "hsa", {"windows": 2}, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_dinov3", "window", {"kernel": 3}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, mixer, settings):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = create(name, depth=1)
    visionattn.swap(model, mixer, **settings)
    file = io.BytesIO()
    program = torch.onnx.export(
        model, (images(model),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    x = images(model, batch=3)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_failures_leave_the_model_as_it_was():
    model = create("beit_base_patch16_224", depth=1)
    x = images(model)
    before, keys = model(x), list(model.state_dict())
    with pytest.raises(InputError, match="HierarchicalMixer does not support a bias or a mask of the logits"):
        visionattn.swap(model, "hsa")
    assert not any(isinstance(module, Swapped) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert not model.patch_embed._forward_hooks
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(x), before)


def test_bad_input():
    model = create("vit_tiny_patch16_224")
    with pytest.raises(UnknownNameError, match="no mixer 'windows': did you mean 'window'"):
        visionattn.swap(model, "windows")
    with pytest.raises(InputError, match="ResNet has no attention layer that swap supports"):
        visionattn.swap(timm.create_model("resnet18"), "hsa")
    with pytest.raises(InputError, match="'silu_cross' has its own projections"):
        visionattn.swap(model, "silu_cross")
    with pytest.raises(InputError, match="'window' does not take side"):
        visionattn.swap(model, "window", side=3)
    with pytest.raises(InputError, match=r"No attention layer matches 'stages\.\*'; there are blocks\.0\.attn"):
        visionattn.swap(model, "hsa", where="stages.*")
    with pytest.raises(InputError, match="every must be at least 1; got 0"):
        visionattn.swap(model, "hsa", every=0)
    with pytest.raises(InputError, match="kernel, dilation and stride must be at least 1"):
        visionattn.swap(model, "window", kernel=0)
    dropping = create("vit_tiny_patch16_224", attn_drop_rate=0.1)
    with pytest.raises(InputError, match="dropout of attention weights"):
        visionattn.swap(dropping, "hsa")
