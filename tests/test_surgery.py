"""Accelerated layers and models against timm's own, and everything that must survive; blocks put into models."""

import copy
import functools
import warnings

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import fx, nn

import visionattn
from visionattn.blocks import HaloAttention, SubspaceAttention
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError

MODELS = [
    "eca_halonext26ts",
    "halo2botnet50ts_256",
    "halonet26t",
    "halonet50ts",
    "halonet_h1",
    "haloregnetz_b",
    "lamhalobotnet50ts_256",
    "sehalonet33ts",
]
CHOICES = [
    {},
    {"block_size": 10, "halo_size": 2},
    {"block_size": 7, "dim_head": 6},
    {"qk_ratio": 0.5},
    {"qkv_bias": True},
    {"scale_pos_embed": True, "dim_head": 16},
    {"dim_out": 24, "num_heads": 2, "qk_ratio": 0.7, "qkv_bias": True},
    {"stride": 2},
    {"stride": 2, "block_size": 10, "halo_size": 2, "dim_out": 32, "dim_head": 4, "scale_pos_embed": True},
    {"stride": 2, "avg_down": True, "qkv_bias": True},
    {"stride": 2, "block_size": 7, "halo_size": 2},
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def name_of(choices):
    return "-".join(f"{name}={value}" for name, value in choices.items()) or "default"


def make(**choices) -> HaloAttn:
    """timm's layer for 16 channels with random values everywhere."""
    layer = HaloAttn(16, **{"num_heads": 4, **choices})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def maps(layer: nn.Module) -> torch.Tensor:
    """Two maps of 3 x 2 blocks: timm takes whole blocks only."""
    return torch.randn(2, 16, 3 * layer.block_size, 2 * layer.block_size).to(layer.kv.weight)


def network() -> nn.Sequential:
    """A small model with two layers, one of them nested, and the same one twice."""
    shared = make(block_size=4, halo_size=1, qkv_bias=True)
    nested = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), make(block_size=4, halo_size=1, stride=2))
    return nn.Sequential(nn.Conv2d(3, 16, 1), shared, nn.ReLU(), shared, nested)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def layers(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error as a share of the largest magnitude."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("choices", CHOICES, ids=name_of)
def test_outputs_and_gradients_of_every_choice(choices, dtype):
    layer = make(**choices).to(dtype)
    x = maps(layer).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = layer(x)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, weight)
    assert visionattn.accelerate(layer) is layer
    assert type(layer) is HaloAttention
    found = layer(x)
    assert off(found, expected) <= TOLERANCE[dtype]
    for grad, expected_grad in zip(torch.autograd.grad(found, leaves, weight), expected_grads):
        assert off(grad, expected_grad) <= TOLERANCE[dtype]


def build(name: str, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    """A model in which no branch is hidden by a zero and no logits grow from block to block, and one image."""
    model = timm.create_model(name, zero_init_last=False, **kwargs).eval()
    for norm in layers(model, timm.layers.BatchNormAct2d):
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(model.head.fc.weight, std=0.1)
    return model, torch.randn(1, *model.default_cfg["input_size"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_model_of_timm(name):
    model, image = build(name)
    parameters, keys, number = dict(model.named_parameters()), list(model.state_dict()), len(layers(model, HaloAttn))
    expected, exact = model(image), model.double()(image.double())
    model.float()

    assert visionattn.accelerate(model) is model
    assert layers(model, HaloAttn) == []
    ours = layers(model, HaloAttention)
    assert len(ours) == number > 0
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters(remove_duplicate=False))

    assert off(model(image), expected) <= 1e-5
    assert off(model.double()(image.double()), exact) <= 1e-10
    for layer in ours:  # were the layers invisible in the logits, these checks would say nothing
        layer.border = "mask"
    assert off(model(image.double()), exact) > 1e-3


def test_the_list_of_models_is_complete():
    names = [name for name in timm.list_models("*halo*") if not name.startswith("va_")]
    assert sorted(names) == MODELS


@torch.no_grad()
def test_bfloat16():
    model, image = build("halonet26t")
    exact = model(image)
    model.bfloat16()
    expected = model(image.bfloat16())
    found = visionattn.accelerate(model)(image.bfloat16())
    assert found.dtype == torch.bfloat16
    assert off(found, expected) <= 3e-2
    assert off(found.float(), exact) <= 1.5 * off(expected.float(), exact)


@torch.no_grad()
def test_autocast():
    model, x = network().eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        found = visionattn.accelerate(model)(x)
    assert off(found, expected) <= 3e-2


def test_an_optimizer_goes_on():
    timms, x = network().double(), images().double()
    ours = copy.deepcopy(timms)
    steps = []
    for model in (timms, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if model is ours:
            visionattn.accelerate(model)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        steps.append([now.detach() - then for now, then in zip(model.parameters(), before)])
    for expected, found in zip(*steps):
        assert off(found, expected) <= 1e-10


def test_weights_of_timm_load_before_and_after():
    source, model, x = network().eval(), network().eval(), images()
    visionattn.accelerate(model).load_state_dict(source.state_dict(), strict=True)
    assert off(model(x), source(x)) <= 1e-5
    network().load_state_dict(model.state_dict(), strict=True)


def test_one_layer_in_several_places_stays_one():
    model, x = network().eval(), images()
    expected = model(x)
    visionattn.accelerate(model)
    assert model[1] is model[3]
    assert len(layers(model, HaloAttention)) == 2
    assert off(model(x), expected) <= 1e-5


def test_flags_stay():
    model = network().train()
    model[4][2].eval()
    model[1].q.weight.requires_grad_(False)
    model[4][2].pos_embed.height_rel.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    visionattn.accelerate(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_pool_of_ones_own_stays():
    layer = make(stride=2, avg_down=True)
    layer.pool = nn.MaxPool2d(2)
    x, pool = maps(layer), layer.pool
    expected = layer(x)
    assert off(visionattn.accelerate(layer)(x), expected) <= 1e-5
    assert layer.pool is pool


def test_wrapped_projections_stay():
    layer = make()
    layer.q = nn.Sequential(layer.q, nn.Dropout(0.0))
    x = maps(layer)
    expected = layer(x)
    assert off(visionattn.accelerate(layer)(x), expected) <= 1e-5


def test_hooks_stay_and_can_be_removed():
    layer, seen = make(), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
        layer.register_forward_hook(lambda module, args, kwargs, output: seen.append("after"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, *grads: seen.append("gradient")),
        layer.q.register_forward_hook(lambda module, args, output: seen.append("q")),
        layer.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module)),
    ]
    x = maps(layer).requires_grad_()
    visionattn.accelerate(layer)(x).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert seen == ["before", "q", "after", "gradient", layer]
    for handle in handles:
        handle.remove()
    layer(x).sum().backward()
    assert len(seen) == 5


def test_a_compiled_model_is_compiled_anew():
    layer = make(block_size=4, halo_size=1)
    compiled, x = torch.compile(layer, backend="eager"), maps(layer)
    expected = compiled(x)
    visionattn.accelerate(compiled)
    layer.border = "mask"
    assert off(compiled(x), expected) > 1e-3
    layer.border = "zero"
    assert off(compiled(x), expected) <= 1e-5


def test_nothing_is_drawn_at_random():
    model, state = network(), torch.get_rng_state()
    visionattn.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_such_layer_stays_as_it_is():
    class Other(HaloAttn):
        pass

    model = nn.Sequential(Other(16), HaloAttention(16))
    assert visionattn.accelerate(model) is model
    assert [type(layer) for layer in model] == [Other, HaloAttention]
    assert model[1].border == "mask"
    assert visionattn.accelerate(visionattn.accelerate(make())).border == "zero"


def test_meta_device():
    layer = visionattn.accelerate(HaloAttn(16, stride=2, device="meta", dtype=torch.bfloat16))
    found = layer(torch.empty(1, 16, 8, 8, device="meta", dtype=torch.bfloat16))
    assert (found.shape, found.dtype, found.device.type) == ((1, 16, 4, 4), torch.bfloat16, "meta")


@torch.no_grad()
def test_script_trace_and_copy():
    model, image = build("halonet26t", scriptable=True)
    expected = model(image)
    visionattn.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        forms = [torch.jit.script(model), fx.symbolic_trace(model), copy.deepcopy(model)]
    for form in forms:
        assert off(form(image), expected) <= 1e-5


def small(name="test_efficientnet", **kwargs) -> nn.Module:
    """A network of timm with channels that 4 divides, and batch norm that has seen images."""
    model = timm.create_model(name, num_classes=3, **kwargs)
    for norm in layers(model, timm.layers.BatchNormAct2d):
        nn.init.normal_(norm.running_mean, std=0.1)
    return model.eval()


def test_replaced_blocks_save_what_the_paper_says(capsys):
    """MobileNet-V2 with a block of 96 and one of 160 channels replaced, and V1 with one of 512."""
    model = timm.create_model("mobilenetv2_100", device="meta")
    savings = visionattn.insert(model, SubspaceAttention, ["blocks.4.2", "blocks.5.2"], mode="replace")
    assert savings == (3_504_872, 3_067_112, 300_774_272, 262_659_328)
    assert capsys.readouterr().out == ""
    assert (
        str(savings)
        == repr(savings)
        == (
            "3,504,872 -> 3,067,112 parameters (-437,760, -12.5%); "
            "300.77 -> 262.66 M multiply-accumulates (-38.11, -12.7%)"
        )
    )
    zoo = timm.create_model("va_mobilenetv2_ulsam_100", device="meta")
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in zoo.state_dict().items()
    }
    model = timm.create_model("mobilenetv1_100", device="meta")
    assert visionattn.insert(model, SubspaceAttention, "blocks.3.5", mode="replace")[1::2] == (3_964_200, 516_657_664)


@torch.no_grad()
def test_an_added_block_stands_behind_the_layer():
    model, x = small(), torch.randn(2, 3, 64, 64)
    target, keys = model.blocks[2][0], set(model.state_dict())
    maps = []
    target.register_forward_hook(lambda module, args, output: maps.append(output))
    savings = visionattn.insert(model, functools.partial(SubspaceAttention, num_subspaces=2), "blocks.2.0")
    layer, block = model.blocks[2][0]
    assert layer is target
    assert block.point.shape[0] == 2
    assert savings.parameters_after - savings.parameters_before == 2 * block.scale.numel()
    assert savings.parameters_after == count_parameters(model)
    assert savings.macs_after == count_macs(model, model.pretrained_cfg["input_size"])
    new = {key.replace("blocks.2.0.0.", "blocks.2.0.") for key in model.state_dict()}
    assert new - keys == {"blocks.2.0.1.scale", "blocks.2.0.1.point"}
    model.blocks[2][0].register_forward_hook(lambda module, args, output: maps.append(output))
    model(x)
    assert torch.equal(maps[-1], block(maps[-2]))


@torch.no_grad()
def test_a_learned_gain_changes_nothing_at_first():
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    visionattn.insert(model, functools.partial(SubspaceAttention, gain="learned"), "blocks.2.0")
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_blocks_that_are_no_gates_are_residual_and_change_nothing_at_first():
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    halo = functools.partial(HaloAttention, num_heads=2, block_size=4, halo_size=1)
    visionattn.insert(model, halo, ["blocks.2.0", "blocks.1.0"])
    assert torch.equal(model(x), expected)
    residual = model.blocks[2][0][1]
    residual.gain.copy_(torch.randn_like(residual.gain))
    z = torch.randn(2, residual.gain.shape[0], 8, 8)
    torch.testing.assert_close(residual(z), z + residual.gain * residual.block(z), rtol=0, atol=0)


def test_a_residual_block_learns():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    visionattn.insert(model, functools.partial(HaloAttention, num_heads=2, block_size=4), "blocks.2.0")
    residual = model.blocks[2][0][1]
    model(x).square().sum().backward()
    assert residual.gain.grad.any()
    assert not residual.block.q.weight.grad.any()
    with torch.no_grad():
        residual.gain += residual.gain.grad
    model(x).square().sum().backward()
    assert residual.block.q.weight.grad.any()


@pytest.mark.parametrize("mode", ["residual", "add", "replace"])
def test_a_mode_that_is_given_is_taken(mode):
    model = small()
    old = model.blocks[2][0].bn1
    visionattn.insert(model, SubspaceAttention, "blocks.2.0.bn1", mode=mode)
    new = model.blocks[2][0].bn1
    found = {"residual": lambda: new[1].block, "add": lambda: new[1], "replace": lambda: new}[mode]()
    assert isinstance(found, SubspaceAttention)
    assert mode == "replace" or new[0] is old


def test_a_block_that_changes_the_shape_is_refused():
    model = small()
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=r"must keep the shape \(96, 20, 20\) at blocks.2.0.bn1; got \(1, 20, 20\)"):
        visionattn.insert(model, lambda dim: nn.Conv2d(dim, 1, 1), "blocks.2.0.bn1")
    with pytest.raises(InputError, match="does not run with this block at"):
        visionattn.insert(model, lambda dim: nn.Conv2d(dim, 1, 1), "blocks.2.0.bn1", mode="add")
    assert list(model.state_dict()) == keys


def test_residual_blocks_trace():
    model, x = small(), torch.randn(1, 3, 64, 64)
    visionattn.insert(model, functools.partial(HaloAttention, num_heads=2, block_size=4), "blocks.2.0")
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_inserted_blocks_take_dtype_mode_and_device():
    model = small().double().train()
    visionattn.insert(model, functools.partial(SubspaceAttention, form="module"), "blocks.2.0")
    block = model.blocks[2][0][1]
    assert block.training
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}


def test_any_network_of_maps():
    model = small("test_resnet")
    savings = visionattn.insert(model, SubspaceAttention, ["layer2", "layer3"], input_size=(3, 64, 64))
    assert savings.parameters_after > savings.parameters_before
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    model.double()(torch.randn(1, 3, 32, 48).double()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.layer3[1].parameters())


def test_what_cannot_be_replaced_is_named_with_what_can():
    model = timm.create_model("mobilenetv2_100", device="meta")
    keys = list(model.state_dict())
    with pytest.raises(InputError, match=r"'blocks.3.0' makes \(64, 14, 14\) of \(32, 28, 28\).*others: .*blocks.4.2"):
        visionattn.insert(model, SubspaceAttention, ["blocks.4.2", "blocks.3.0"], mode="replace")
    with pytest.raises(InputError, match=r"no layer 'blocks.9' .*insert takes, among others: blocks.0.0, blocks.1.0, "):
        visionattn.insert(model, SubspaceAttention, "blocks.9")
    with pytest.raises(InputError, match="'classifier' does not return a map"):
        visionattn.insert(model, SubspaceAttention, "classifier")
    with pytest.raises(InputError, match="mode must be one of 'residual', 'add', 'replace', or None; got 'delete'"):
        visionattn.insert(model, SubspaceAttention, "blocks.4.2", mode="delete")
    with pytest.raises(InputError, match=r"dim \(96\) must be divisible by num_subspaces \(5\)"):
        visionattn.insert(model, functools.partial(SubspaceAttention, num_subspaces=5), "blocks.4.2", mode="replace")
    with pytest.raises(InputError, match="does not run with this block"):
        visionattn.insert(model, lambda dim: nn.Conv2d(dim, dim + 1, 1), ["blocks.4.1", "blocks.4.2"], mode="replace")
    with pytest.raises(InputError, match=r"'blocks\.4\.2' is or is inside 'blocks\.4'"):
        visionattn.insert(model, SubspaceAttention, ["blocks.4.2", "blocks.4"])
    assert list(model.state_dict()) == keys
    with pytest.raises(InputError, match=r"pass input_size, \(C, H, W\), to insert"):
        visionattn.insert(network(), SubspaceAttention, "0")
