"""SPAN and its relatives of the challenges: cost, sizes, forms, reach, what the state dict says."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visionattn
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError
from visionattn.models.span import SCALES, WIDTHS, SuperResolver

SPANS = [f"va_span_ch{width}_x{scale}" for width in WIDTHS for scale in SCALES]
RELATIVES = ["va_spanf_x4", "va_espan_x4", "va_spanv2_x4"]
SMALL = ["va_span_ch26_x2", "va_span_ch26_x3", *RELATIVES]
# Parameters of x2, x3 and x4, and GMACs for an output of 1280 x 720.
COSTS = {
    26: ((122_368, 125_893, 130_828), (28.07, 12.83, 7.50)),
    28: ((141_580, 145_375, 150_688), (32.48, 14.82, 8.64)),
    32: ((184_204, 188_539, 194_608), (42.28, 19.24, 11.17)),
    48: ((410_700, 417_195, 426_288), (94.39, 42.62, 24.49)),
    52: ((481_324, 488_359, 498_208), (110.64, 49.89, 28.63)),
}


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def test_all_names_are_there():
    assert {name for name in visionattn.models.names() if "span" in name} == {*SPANS, *RELATIVES}
    assert timm.model_entrypoint("va_span_ch26_x2").__doc__.startswith("SPAN of 26 channels for a scale of 2")
    assert timm.model_entrypoint("va_span_ch26_x2") is visionattn.models.span.va_span_ch26_x2


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("index", range(3))
def test_parameters_and_macs(width, index):
    scale = SCALES[index]
    model = build(f"va_span_ch{width}_x{scale}", device="meta")
    c, r = width, scale
    formula = 28 * c + 18 * (9 * c**2 + c) + (9 * c**2 + c) + (4 * c**2 + c) + 27 * c * r**2 + 3 * r**2
    assert count_parameters(model) == COSTS[width][0][index] == formula
    macs = count_macs(model, (3, 64, 64)) / 64**2
    assert macs == 27 * c + 175 * c**2 + 27 * c * r**2
    assert macs * 1280 * 720 / r**2 / 1e9 == pytest.approx(COSTS[width][1][index], abs=0.006)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("va_spanf_x4", 148_288, 9.68), ("va_espan_x4", 192_272, 12.556), ("va_spanv2_x4", 139_104, 9.108)],
)
def test_parameters_and_macs_of_the_relatives(name, parameters, gmacs):
    model = build(name, device="meta")
    assert count_parameters(model) == parameters
    assert count_macs(model, (3, 256, 256)) / 1e9 == pytest.approx(gmacs, abs=0.003)


@pytest.mark.parametrize("name", [*SPANS, *RELATIVES])
def test_card_meta_dtype_and_unknown_arguments(name):
    config = timm.get_pretrained_cfg(name)
    assert config.num_classes == -1
    assert config.mean == (0, 0, 0)
    model = build(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert f"{config.first_conv}.weight" in model.state_dict()
    assert (model.task, model.num_classes, model.size_multiple, model.size_minimum) == ("restore", 0, 1, 1)
    assert model.scale == int(name[-1])
    assert model.num_features == (32 if name in RELATIVES else int(name.split("_ch")[1][:2]))
    for wrong in ({"not_an_argument": 1}, {"num_classes": 10}):
        with pytest.raises(TypeError):
            build(name, device="meta", **wrong)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_any_size_and_channels(name, in_chans):
    model = build(name, in_chans=in_chans)
    scale = model.scale
    for batch, height, width in [(1, 1, 1), (2, 1, 7), (1, 13, 6)]:
        out = model(torch.rand(batch, in_chans, height, width))
        assert out.shape == (batch, in_chans, scale * height, scale * width)
        assert torch.isfinite(out).all()


def test_other_widths_scales_and_outputs():
    model = build("va_span_ch26_x4", width=5, scale=1, in_chans=4, out_chans=3, cat_width=2)
    assert model(torch.rand(1, 4, 3, 5)).shape == (1, 3, 3, 5)
    for wrong in ({"in_chans": 5}, {"out_chans": 0}, {"scale": 0}):
        with pytest.raises(InputError, match=r"must be .*; got"):
            build("va_span_ch26_x4", **wrong)


def test_output_is_not_clamped():
    model = build("va_span_ch26_x2")
    inside = model(torch.rand(1, 3, 8, 8))
    model.upsampler.bias.data += 3
    torch.manual_seed(0)
    assert model(torch.rand(1, 3, 8, 8)).min() > 2
    assert inside.max() < 2


@pytest.mark.parametrize("name", ["va_span_ch26_x3", *RELATIVES])
def test_radius_is_how_far_an_output_pixel_sees(name):
    model = build(name, dtype=torch.float64, **({"width": 4} if name != "va_spanv2_x4" else {}))
    radius, scale = model.radius, model.scale
    x = torch.rand(1, 3, 2 * radius + 5, 2 * radius + 5, dtype=torch.float64, requires_grad=True)
    place = radius + 2
    pixel = model(x)[..., scale * place : scale * (place + 1), scale * place : scale * (place + 1)]
    (seen,) = torch.autograd.grad(pixel.square().sum(), x)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    columns = seen.abs().sum((0, 1, 2)).nonzero().flatten()
    for found in (rows, columns):
        assert (found.min().item(), found.max().item()) == (2, 2 * radius + 2)


@pytest.mark.parametrize("name", ["va_span_ch26_x2", "va_spanf_x4", "va_espan_x4"])
def test_fused_network_computes_what_the_branches_do(name):
    model = build(name, branches=True, dtype=torch.float64)
    x = torch.rand(1, 3, 9, 11, dtype=torch.float64)
    expected = model(x)
    assert count_parameters(model) > 3 * count_parameters(build(name, device="meta"))
    assert model.fuse() is model
    assert set(model.state_dict()) == set(build(name, device="meta").state_dict())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11 * expected.abs().max().item())
    torch.testing.assert_close(model.unfuse()(x), expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_network_is_its_equations():
    model = build("va_span_ch26_x3", width=6, cat_width=5, dtype=torch.float64)
    x = torch.rand(2, 3, 7, 5, dtype=torch.float64)

    def conv(layer, x):
        layer = getattr(layer, "conv", layer)
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    f0 = f = conv(model.conv_1, (x - torch.tensor([0.4488, 0.4371, 0.4040]).double().view(3, 1, 1)) * 255)
    outputs = []
    for block in model.blocks:
        s = F.silu(conv(block.conv1, f))
        h = conv(block.conv3, F.silu(conv(block.conv2, s)))
        f = (h + f) * (torch.sigmoid(h) - 0.5)
        outputs.append(f)
    z = conv(model.conv_cat, torch.cat([f0, conv(model.conv_2, f), outputs[0], s], dim=1))
    expected = F.pixel_shuffle(conv(model.upsampler, z), 3)
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["va_spanf_x4", "va_spanv2_x4"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_near_starts_as_nearest_neighbour_upsampling(name, in_chans):
    model, x = build(name, in_chans=in_chans), torch.rand(1, in_chans, 5, 6)
    assert torch.equal(F.pixel_shuffle(model.near(x), 4), F.interpolate(x, scale_factor=4, mode="nearest"))


@pytest.mark.parametrize("name", ["va_span_ch26_x2", *RELATIVES])
@pytest.mark.parametrize("branches", [False, True])
def test_fx_script_compile(name, branches):
    if branches and name == "va_spanv2_x4":
        pytest.skip("SPANV2 has no branches")
    model = build(name, **({"branches": True} if branches else {}))
    x = torch.rand(2, 3, 6, 7)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["va_span_ch26_x2", "va_espan_x4"])
def test_channels_last_and_plain_inputs_agree(name):
    model, x = build(name).double(), torch.rand(2, 3, 8, 9, dtype=torch.float64)
    expected = model(x)
    for layout in (torch.channels_last, torch.contiguous_format):
        other = copy.deepcopy(model).to(memory_format=layout)
        torch.testing.assert_close(other(x.to(memory_format=layout)), expected)


def test_normalisation():
    model = build("va_span_ch26_x2")
    assert not any("mean" in key for key in model.state_dict())
    torch.testing.assert_close(model.norm.mean.flatten(), torch.tensor([0.4488, 0.4371, 0.4040]))
    assert model.double().norm.mean.dtype == torch.float64
    grey = build("va_span_ch26_x2", in_chans=1)
    torch.testing.assert_close(grey.norm(torch.ones(1, 1, 1, 1)), torch.full((1, 1, 1, 1), 255 * (1 - 1.2899 / 3)))
    assert isinstance(build("va_span_ch26_x2", norm=False).norm, nn.Identity)


def test_state_dict_says_what_no_shape_tells():
    plain = set(build("va_span_ch26_x2").state_dict())
    assert set(build("va_span_ch26_x2", norm=False).state_dict()) == plain | {"no_norm"}
    stretched = build("va_span_ch26_x2", img_range=1.0)
    assert set(stretched.state_dict()) == plain | {"norm.img_range"}
    assert stretched.state_dict()["norm.img_range"].item() == 1
    with pytest.raises(RuntimeError, match="no_norm"):
        build("va_span_ch26_x2").load_state_dict(build("va_span_ch26_x2", norm=False).state_dict())
    with pytest.raises(RuntimeError, match=r"img_range of 1\.0; .* 2\.0"):
        build("va_span_ch26_x2", img_range=2.0).load_state_dict(stretched.state_dict())


def test_meta_device_then_weights():
    model, x = build("va_span_ch26_x2"), torch.rand(1, 3, 5, 5)
    other = timm.create_model("va_span_ch26_x2", device="meta").eval().to_empty(device="cpu")
    for module in other.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["va_span_ch26_x2", "va_spanv2_x4"])
def test_folder_round_trip_is_exact(name, tmp_path):
    model, x = build(name), torch.rand(1, 3, 5, 6)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), visionattn.load(tmp_path)):
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = build("va_spanf_x4").to(dtype), torch.rand(1, 3, 6, 6, dtype=dtype)
    out = model(x)
    assert out.dtype == dtype
    expected = model.float()(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["va_span_ch26_x2", *RELATIVES])
def test_every_parameter_learns(name):
    model = build(name).train()
    model(torch.rand(1, 3, 6, 6)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert isinstance(model, SuperResolver)
