"""MatchStereo and MatchFlow: cost, sizes, symmetries, the network as its equations, precision, bad input."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visionattn
from tests.blocks.contract import randomise
from visionattn.blocks.match_decoder import exchange_views
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError
from visionattn.models.match_stereo import FEWER_LAYERS, MatchFlow, MatchStereo

# Parameters of the paper's networks less those that nothing reads, and GMACs for a pair of 384 x 1248.
COSTS = {
    "va_match_stereo_nano": (976_574, 5.36),
    "va_match_stereo_tiny": (8_784_528 - 163_176, 34.81),
    "va_match_stereo_small": (25_231_248 - 324_200, 100.66),
    "va_match_stereo_base": (75_448_400 - 518_888, 366.36),
    "va_match_flow_nano": (976_574, 5.386),
    "va_match_flow_tiny": (8_784_528 - 163_176, 34.84),
    "va_match_flow_base": (75_448_400 - 518_888, 366.47),
}
LITTLE = {"widths": (8, 8, 16, 16), "encoder_depths": (1, 1, 1, 1), "depths": (1, 1, 2, 1)}


def build(network=MatchStereo, **kwargs):
    """A little network whose weights are as loud as trained ones; positions move by pixels, not hundreds of them."""
    model = randomise(network(**{**LITTLE, **kwargs})).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_((0.3 if "proj" in key else 1) / max(1, p[0].numel() ** 0.5) / p.std())
            if "field_scale" in key:
                p.fill_(0.3)
    return model


def views(batch=1, height=192, width=192, **kwargs):
    """A smooth picture with some noise, and the same moved by seven pixels."""
    left = F.interpolate(torch.rand(batch, 3, 12, 12), (height, width), mode="bicubic").clamp(0, 1)
    left = (left + 0.1 * torch.rand(batch, 3, height, width)) / 1.1
    return left.to(**kwargs), left.roll(-7, 3).to(**kwargs)


def test_all_names_are_there():
    assert {name for name in visionattn.models.names() if "match" in name} == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert count_parameters(model) == COSTS[name][0]
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.bfloat16}
    assert count_macs(model, (3, 384, 1248), (3, 384, 1248)) / 1e9 == pytest.approx(COSTS[name][1], abs=0.006)


@pytest.mark.parametrize("name", COSTS)
def test_card_and_unknown_arguments(name):
    config = timm.get_pretrained_cfg(name)
    untrained = name == "va_match_flow_tiny"
    published = not untrained and not name.endswith("_nano")
    assert bool(config.has_weights) != untrained
    assert config.license == ("not stated" if published else "apache-2.0")
    assert config.hf_hub_id == ("Tingman/MatchAttention" if published else None)
    model = timm.create_model(name, device="meta")
    assert f"{config.first_conv}.weight" in model.state_dict()
    assert (model.task, model.num_classes) == (name.split("_")[2], 0)
    assert (model.size_multiple, model.size_minimum) == (1, 161)
    for wrong in ({"not_an_argument": 1}, {"num_classes": 10}, {"in_chans": 1}):
        with pytest.raises(TypeError):
            timm.create_model(name, device="meta", **wrong)


def test_border_is_padding_and_a_crop():
    plain, wide = build(), build(border=32)
    wide.load_state_dict(plain.state_dict())
    left, right = views(1, 192, 200)
    extended = [F.pad(view, (32, 32 + 24, 0, 0), mode="replicate") for view in (left, right)]
    with torch.inference_mode():
        torch.testing.assert_close(wide(left, right), plain(*extended)[..., 32:232])
        assert wide.forward_fields(left, right).start.shape == (2, 6, 9, 2)
    with pytest.raises(InputError, match="border must be a multiple of 32; got 40"):
        build(border=40)


@pytest.mark.parametrize("depths", [*FEWER_LAYERS, (0, 2, 0, 1)])
def test_fewer_layers(depths):
    model = timm.create_model("va_match_stereo_tiny", device="meta", depths=depths)
    assert tuple(len(layers) for layers in model.decoder) == depths
    fields = model.forward_fields(*[torch.empty(1, 3, 192, 192, device="meta")] * 2)
    assert len(fields.after_self) == len(fields.after_cross) == sum(depths)


@pytest.mark.parametrize(("network", "channels"), [(MatchStereo, 2), (MatchFlow, 4)])
@pytest.mark.parametrize("size", [(161, 203), (192, 170)])
def test_any_size(network, channels, size):
    model, (left, right) = build(network), views(2, *size)
    out = model(left, right)
    assert out.shape == (2, channels, *size)
    assert out.isfinite().all()
    fields = model.forward_fields(left, right)
    assert fields.field.shape == (4, *size, 2)
    height, width = (-(-side // 32) * 32 for side in size)
    assert fields.start.shape == (4, height // 32, width // 32, 2)
    assert [f.shape[1:3] for f in fields.after_cross] == [(height // s, width // s) for s in (32, 16, 8, 8, 4)]
    assert [f.shape[1:3] for f in fields.upsampled] == [(height // s, width // s) for s in (16, 8, 4)]


def test_nano_runs_by_name():
    model = timm.create_model("va_match_stereo_nano").eval()
    out = model(*views())
    assert out.shape == (1, 2, 192, 192)
    assert out.isfinite().all()
    assert out.min() >= 0


def test_padding_repeats_the_first_row_and_the_last_column():
    model, pair = build(), views(1, 165, 190)
    bigger = [torch.cat([view[:, :, :1].expand(-1, -1, 27, -1), view], 2) for view in pair]
    bigger = [torch.cat([view, view[..., -1:].expand(-1, -1, -1, 2)], 3) for view in bigger]
    assert torch.equal(model.pad(pair[0]), bigger[0])
    torch.testing.assert_close(model(*pair), model(*bigger)[:, :, 27:, :190])


def test_outputs_are_the_fields():
    pair = views(2)
    for network in (MatchStereo, MatchFlow):
        model = build(network)
        field, out = model.forward_fields(*pair).field, model(*pair)
        if network is MatchFlow:
            assert torch.equal(out, torch.cat([field[:2], field[2:]], -1).permute(0, 3, 1, 2))
            assert (field[..., 1].abs().amax((1, 2)) > 0).all()
        else:
            assert torch.equal(out[:, 0], (-field[:2, ..., 0]).clamp(min=0))
            assert torch.equal(out[:, 1], field[2:, ..., 0].clamp(min=0))
            assert not field[..., 1].any()


def layer_norm(x, weight, eps=1e-6):
    return F.layer_norm(x, weight.shape, weight, eps=eps)


def channels_first(x):
    return x.permute(0, 3, 1, 2)


def channels_last(x):
    return x.permute(0, 2, 3, 1)


def by_the_equations(model, left, right):
    """The network from its weights; layers, start and convex upsampling, proven elsewhere, as modules."""
    w, x = model.state_dict(), 2 * torch.cat([left, right]) - 1
    for number in (0, 3):
        x = F.conv2d(x, w[f"encoder.stem.{number}.weight"], w[f"encoder.stem.{number}.bias"], 2, 1)
        x = (x - x.mean((2, 3), True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        x = F.gelu(x)
    x, maps = channels_last(x), []
    for size, blocks in enumerate(LITTLE["encoder_depths"]):
        if size:
            place = f"encoder.downsamplings.{size - 1}"
            x = channels_first(layer_norm(x, w[f"{place}.pre_norm.weight"]))
            x = channels_last(F.conv2d(x, w[f"{place}.conv.weight"], w[f"{place}.conv.bias"], 2, 1))
        for block in range(blocks):
            b = {key.split(".", 4)[4]: v for key, v in w.items() if key.startswith(f"encoder.stages.{size}.{block}.")}
            y = channels_first(F.gelu(layer_norm(x, b["norm1.weight"]) @ b["token_mixer.pwconv1.weight"].T))
            y = F.conv2d(y, b["token_mixer.dwconv.weight"], padding=1, groups=y.shape[1])
            x = x + channels_last(y) @ b["token_mixer.pwconv2.weight"].T
            y = F.gelu(layer_norm(x, b["norm2.weight"]) @ b["mlp.fc1.weight"].T)
            x = x + y @ b["mlp.fc2.weight"].T
        maps.append(x)
    field, positions, found = model.start(x), 0 * x[..., :2], []
    for size, layers in enumerate(model.decoder):
        if size:
            low, skip, place = x, maps[3 - size], f"fusions.{size - 1}"
            up = model.upsamplings[size - 1]
            field, positions = up(low, field), up(low, positions)
            x = F.conv_transpose2d(channels_first(low), w[f"{place}.up.weight"], w[f"{place}.up.bias"], 2)
            x = torch.cat([channels_first(skip), x], 1)
            x = F.conv2d(x, w[f"{place}.conv.0.weight"], w[f"{place}.conv.0.bias"]).relu()
            x = channels_last(F.conv2d(x, w[f"{place}.conv.2.weight"], w[f"{place}.conv.2.bias"], padding=1))
        heads = torch.cat([positions] * 4, -1)
        for layer in layers:
            x, field_self, field, heads = layer(x, field, heads)
            found += [field_self, field]
        positions = (heads[..., :2] + heads[..., 2:4] + heads[..., 4:6] + heads[..., 6:]) / 4
    return model.upsamplings[3](x, field), found


@pytest.mark.parametrize(("network", "depths"), [(MatchStereo, (1, 1, 2, 1)), (MatchFlow, (0, 2, 0, 1))])
def test_network_is_its_equations(network, depths):
    model, pair = build(network, depths=depths, dtype=torch.float64), views(1, 192, 224, dtype=torch.float64)
    with torch.no_grad():
        fields, (expected, layers) = model.forward_fields(*pair), by_the_equations(model, *pair)
    assert expected.abs().max() > 5
    torch.testing.assert_close(fields.field, expected, rtol=1e-9, atol=1e-9)
    pairs = [field for both in zip(fields.after_self, fields.after_cross) for field in both]
    torch.testing.assert_close(pairs, layers, rtol=1e-9, atol=1e-9)


def test_swapping_the_views_swaps_the_fields():
    """Of a stereo network from swapped starts; the start itself looks to the left in the left view only."""
    model, (left, right) = build(dtype=torch.float64), views(2, dtype=torch.float64)
    fields = model.forward_fields(left, right)
    swapped = model.forward_fields(right, left, exchange_views(fields.start))
    torch.testing.assert_close(swapped.field, exchange_views(fields.field))
    torch.testing.assert_close(swapped.after_self, [exchange_views(field) for field in fields.after_self])
    assert swapped.probability is None


def test_swapping_the_images_swaps_the_flows():
    model, (first, second) = build(MatchFlow, dtype=torch.float64), views(2, dtype=torch.float64)
    model.start.k = model.start.q
    flow, swapped = model(first, second), model(second, first)
    torch.testing.assert_close(swapped, torch.cat([flow[:, 2:], flow[:, :2]], 1))


def test_a_batch_is_its_pairs():
    for network in (MatchStereo, MatchFlow):
        model, (left, right) = build(network, dtype=torch.float64), views(3, dtype=torch.float64)
        alone = [model(left[n : n + 1], right[n : n + 1]) for n in range(3)]
        torch.testing.assert_close(model(left, right), torch.cat(alone))


@pytest.mark.parametrize("network", [MatchStereo, MatchFlow])
def test_every_parameter_learns(network):
    model = build(network).train()
    fields = model.forward_fields(*views(2))
    fields.field.square().mean().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Instance norm takes the mean off: biases before it change nothing, and rounding alone is their gradient.
    assert set(silent) <= {"encoder.stem.0.bias", "encoder.stem.3.bias"}
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_probability_of_the_start_has_gradients():
    for network, axis in ((MatchStereo, 6), (MatchFlow, 36)):
        model = build(network)
        probability = model.forward_fields(*views()).probability
        assert probability.shape[-1] == axis
        probability[..., 0].log().mean().backward()
        assert model.start.q.weight.grad.abs().max() > 0


def test_gradient_checkpointing_changes_nothing():
    model, pair = build(dtype=torch.float64).train(), views(dtype=torch.float64)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for network in (model, other):
        network.forward_fields(*pair).field.square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("network", [MatchStereo, MatchFlow])
@pytest.mark.parametrize("autocast", [False, True])
def test_fields_of_half_precisions_are_float32(network, dtype, autocast):
    model, pair = build(network), views()
    if not autocast:
        model, pair = model.to(dtype), [view.to(dtype) for view in pair]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        fields = model.forward_fields(*pair)
    every = [fields.field, fields.start, *fields.after_self, *fields.after_cross, *fields.upsampled]
    assert {field.dtype for field in every} == {torch.float32}
    assert all(field.isfinite().all() for field in every)


def test_autocast_rounds_the_result_little():
    """From one start, since the argmax of another one may jump; the mask may, here and there."""
    model, pair = build(), views()
    start = model.forward_fields(*pair).start
    expected = model(*pair, start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*pair, start)
    assert (found - expected).abs().median() < 0.02 * expected.max()


def test_low_resolution_start():
    model, pair = build(), views(1, 370, 384)
    start = model.low_resolution_start(*pair)
    halves = [F.avg_pool2d(model.pad(view), 2) for view in pair]
    field = model.forward_fields(*halves).field.permute(0, 3, 1, 2)
    assert field.shape == (2, 2, 192, 192)
    # Corners stay, and a pixel at 1/32 is 16 pixels of the half image.
    torch.testing.assert_close(start[:, ::11, ::11] * 16, field[..., ::191, ::191].permute(0, 2, 3, 1))
    assert start.shape == (2, 12, 12, 2)
    fields = model.forward_fields(*pair, start)
    assert torch.equal(fields.start, start)
    assert fields.field.shape == (2, 370, 384, 2)


def test_start_of_the_weights():
    model = timm.create_model("va_match_stereo_nano")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is None or not module.bias.any()
            assert module.weight.abs().max() < 0.12
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.fusions[0].up.bias.any()
    assert torch.equal(model.decoder[-1][0].field_scale, torch.full((1, 1, 1, 2), 0.1))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((1, 3, 192, 192), (1, 3, 192, 224), r"Both views must have the same size; got \(1, 3, 192, 192\) and"),
        ((2, 3, 192, 192), (1, 3, 192, 192), "Both views must have the same size"),
        ((1, 1, 192, 192), (1, 1, 192, 192), r"RGB images \(B, 3, H, W\) in 0\.\.1; got \(1, 1, 192, 192\)"),
        ((3, 192, 192), (3, 192, 192), "RGB images"),
        ((1, 3, 160, 500), (1, 3, 160, 500), "at least 161 pixels high and wide; got 160 x 500"),
    ],
)
def test_bad_views(left, right, message):
    with pytest.raises(InputError, match=message):
        build()(torch.rand(left), torch.rand(right))


def test_bad_starts_and_arguments():
    model, pair = build(), views()
    with pytest.raises(InputError, match=r"start must have the shape \(2, 6, 6, 2\); got \(1, 6, 6, 2\)"):
        model(*pair, torch.zeros(1, 6, 6, 2))
    with pytest.raises(InputError, match="at least 321 pixels"):
        model.low_resolution_start(*pair)
    with pytest.raises(InputError, match="got 4, 4 and 3 entries"):
        MatchStereo(depths=(1, 1, 1))
    for wrong in ({"widths": (8, 8, 16, 18)}, {"depths": (1, 1, 1, 0)}, {"depths": (-1, 1, 1, 1)}):
        with pytest.raises(InputError, match="widths must be divisible by 4, and encoder_depths"):
            MatchStereo(**wrong)


def test_compiles_whole():
    model, pair = build(depths=(1, 1, 1, 1)), views()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*pair), model(*pair))


@pytest.mark.parametrize("name", ["va_match_stereo_nano", "va_match_flow_tiny"])
def test_folder_round_trip_is_exact(name, tmp_path):
    model, pair = timm.create_model(name, depths=(1, 1, 1, 1)).eval(), views()
    timm.models.save_for_hf(model, tmp_path, model_args={"depths": (1, 1, 1, 1)}, safe_serialization=True)
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), visionattn.load(tmp_path)):
        assert torch.equal(again(*pair), model(*pair))
