"""SPAN files of every layout: which network they are, and what it computes from them."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import visionattn
from visionattn import weights
from visionattn.errors import CheckpointError
from visionattn.export import export_onnx
from visionattn.models.span import SPAN
from visionattn.weights import span

KEYS = Path(__file__).parent / "published" / "span.tsv"
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MEAN = torch.tensor([0.4488, 0.4371, 0.4040], dtype=torch.float64).view(3, 1, 1)
# File, name, arguments, mean PSNR of Set5 x4 as measured from the published code.
PUBLISHED = [
    ("team38_span_ch28_slim.pth", "va_span_ch28_x4", {}, 31.746),
    ("team39_spantiny_ch26_slim.pth", "va_span_ch26_x4", {}, 31.739),
    ("team23_DSCF.pth", "va_span_ch26_x4", {}, None),
    ("team46_span.pth", "va_span_ch28_x4", {"cat_width": 20}, 31.743),
    ("team24_spanf.pth", "va_spanf_x4", {}, 31.774),
    ("team36_espan.pth", "va_espan_x4", {}, 31.942),
    ("team22_spanv2_c2.pth", "va_spanv2_x4", {}, 31.770),
]


def published(name):
    path = SHARED / "weights" / "span" / name
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


def luma(image):
    return 16 + image.astype(np.float64) @ [65.481, 128.553, 24.966] / 255


def set5_psnr(model):
    folder, values = SHARED / "data" / "sr" / "Set5", []
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    for path in sorted((folder / "HR").glob("*.png")):
        truth, low = (
            np.asarray(Image.open(file).convert("RGB")).copy() for file in (path, folder / "LRbicx4" / path.name)
        )
        with torch.inference_mode():
            out = model(torch.from_numpy(low).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).numpy()
        found = np.floor(np.clip(out * 255.0, 0, 255) + 0.5)
        error = (luma(found) - luma(truth[: found.shape[0], : found.shape[1]]))[4:-4, 4:-4]
        values.append(10 * np.log10(255**2 / np.square(error).mean()))
    assert len(values) == 5
    return np.mean(values)


@pytest.mark.parametrize(("file", "name", "settings", "bar"), PUBLISHED)
def test_published_files(file, name, settings, bar):
    path = published(file)
    state = weights.unwrap(weights.read(path))
    assert span.identify(state) == (name, settings)
    model = visionattn.load(path)
    assert model.pretrained_cfg["architecture"] == name
    assert not model.training
    # Every number of the file is in the model, and nothing else.
    stored = sorted(value.double().sum().item() for value in state.values())
    assert sorted(value.double().sum().item() for value in model.state_dict().values()) == stored
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in state.values())
    assert set5_psnr(model) == pytest.approx(31.747 if bar is None else bar, abs=0.005)


def test_a_name_that_is_said_keeps_what_the_shapes_tell():
    path = published("team46_span.pth")
    assert visionattn.load(path, name="va_span_ch28_x4").conv_cat.out_channels == 20


@pytest.mark.parametrize(("file", "name", "settings", "bar"), PUBLISHED)
def test_timms_way_and_the_bare_one(file, name, settings, bar):
    path = published(file)
    x = torch.rand(1, 3, 6, 5)
    expected = visionattn.load(path)(x)
    model = timm.create_model(name, checkpoint_path=str(path), **settings).eval()
    assert torch.equal(model(x), expected)
    bare = timm.create_model(name, **settings).eval()
    bare.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    assert torch.equal(bare(x), expected)


def official(width=4, scale=2, in_chans=3, gain=2, seed=0, **extra):
    """A file as the authors' code writes it in training: in branches, `eval_conv` out of date."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, out_chans, in_chans, side):
        state[f"{name}.weight"] = torch.randn(out_chans, in_chans, side, side, generator=generator) / in_chans**0.5
        state[f"{name}.bias"] = torch.randn(out_chans, generator=generator) / 4

    def conv(name, in_chans, out_chans):
        add(f"{name}.sk", out_chans, in_chans, 1)
        add(f"{name}.conv.0", gain * in_chans, in_chans, 1)
        add(f"{name}.conv.1", gain * out_chans, gain * in_chans, 3)
        add(f"{name}.conv.2", out_chans, gain * out_chans, 1)
        add(f"{name}.eval_conv", out_chans, in_chans, 3)

    conv("conv_1", in_chans, width)
    for block in range(1, 7):
        for layer in (1, 2, 3):
            conv(f"block_{block}.c{layer}_r", width, width)
    conv("conv_2", width, width)
    add("conv_cat", width, 4 * width, 1)
    add("upsampler.0", in_chans * scale**2, width, 3)
    for key in state:
        if "eval_conv" not in key:
            state[key] = state[key] * 0.4
    return state | extra


def by_the_keys(state, x, scale=2):
    """The network computed from the authors' keys, in float64, branch by branch where there are branches."""
    state = {key: value.double() for key, value in state.items()}

    def plain(name, x, **kwargs):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def conv(name, x):
        if f"{name}.sk.weight" not in state:
            return plain(f"{name}.eval_conv", x, padding=1)
        wide = plain(f"{name}.conv.0", F.pad(x, (1, 1, 1, 1)))
        return plain(f"{name}.conv.2", plain(f"{name}.conv.1", wide)) + plain(f"{name}.sk", x)

    x = x.double()
    f0 = f = f1 = conv("conv_1", x if "no_norm" in state else (x - MEAN) * 255)
    for block in range(1, 7):
        s = F.silu(conv(f"block_{block}.c1_r", f))
        h = conv(f"block_{block}.c3_r", F.silu(conv(f"block_{block}.c2_r", s)))
        f = (h + f) * (h.sigmoid() - 0.5)
        f1 = f if block == 1 else f1
    z = plain("conv_cat", torch.cat([f0, conv("conv_2", f), f1, s], dim=1))
    return F.pixel_shuffle(plain("upsampler.0", z, padding=1), scale)


def drawn(file):
    """Random weights of the keys and shapes of a published file, for whoever has none of the files."""
    generator, state = torch.Generator().manual_seed(0), {}
    for line in KEYS.read_text().splitlines()[1:]:
        of, key, shape = line.split("\t")
        if of == file:
            shape = [int(size) for size in shape.split("x")]
            fan_in = math.prod(shape[1:])
            state[key] = torch.randn(shape, generator=generator) / fan_in**0.5 if fan_in > 1 else torch.randn(shape) / 4
    return state


@pytest.mark.parametrize(("file", "name", "settings", "bar"), PUBLISHED)
def test_published_keys_and_shapes(file, name, settings, bar, tmp_path):
    state, x = drawn(file), torch.rand(2, 3, 9, 8)
    assert span.identify(state) == (name, settings)
    torch.save({"params_ema": state}, tmp_path / file)
    model = visionattn.load(tmp_path / file)
    assert model.pretrained_cfg["architecture"] == name
    stored = sorted(value.double().sum().item() for value in state.values())
    assert sorted(value.double().sum().item() for value in model.state_dict().values()) == stored
    direct = timm.create_model(name, **settings).eval()
    direct.load_state_dict(span.convert(state, branches=False), strict=True)
    assert torch.equal(model(x), direct(x))
    if "span_ch" in name:
        exact = timm.create_model(name, dtype=torch.float64, **settings).eval()
        exact.load_state_dict(model.state_dict())
        assert_near(exact(x.double()), by_the_keys(state, x, scale=4))


def assert_near(found, expected, tolerance=1e-12):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("extra", [{}, {"no_norm": torch.zeros(())}])
def test_branches_load_into_both_forms(branches, extra):
    state, x = official(**extra), torch.rand(1, 3, 6, 7)
    model = SPAN(width=4, scale=2, branches=branches, norm=not extra, dtype=torch.float64).eval()
    model.load_state_dict({key: value.double() for key, value in state.items()})
    assert_near(model(x.double()), by_the_keys(state, x))


@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"params": official(seed=1), "params_ema": s}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_files(tmp_path, wrap, prefix):
    state, x = official(width=26), torch.rand(1, 3, 5, 5)
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / "net.pth")
    expected = by_the_keys(state, x)
    for model in (
        visionattn.load(tmp_path / "net.pth"),
        timm.create_model("va_span_ch26_x2", checkpoint_path=str(tmp_path / "net.pth")).eval(),
    ):
        assert_near(model(x), expected, 1e-3)  # float32, and random weights amplify its rounding
        assert model.pretrained_cfg["architecture"] == "va_span_ch26_x2"
        assert model.conv_1.conv is not None


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("made", "name", "settings"),
    [
        ({"width": 26, "scale": 3, "no_norm": torch.zeros(1)}, "va_span_ch26_x3", {"norm": False}),
        (
            {"width": 26, "scale": 2, "in_chans": 1, "no_norm": torch.zeros(1)},
            "va_span_ch26_x2",
            {"in_chans": 1, "norm": False},
        ),
        ({"width": 6, "scale": 1}, "va_span_ch48_x4", {"width": 6, "scale": 1}),
    ],
)
def test_settings_come_from_the_shapes(tmp_path, kind, made, name, settings):
    state = official(**made)
    assert span.identify(state) == (name, settings)
    path = tmp_path / f"net.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    model, x = visionattn.load(path), torch.rand(1, made.get("in_chans", 3), 4, 5)
    assert_near(model.double()(x.double()), by_the_keys(state, x, made["scale"]), 1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("va_span_ch26_x3", {}),
        ("va_span_ch26_x2", {"branches": True}),
        ("va_span_ch28_x4", {"cat_width": 20, "norm": False}),
        ("va_span_ch28_x2", {"in_chans": 4, "out_chans": 3, "img_range": 1.0}),
        ("va_spanf_x4", {"in_chans": 1}),
        ("va_spanf_x4", {"branches": True}),
        ("va_espan_x4", {}),
        ("va_spanv2_x4", {"scale": 2, "width": 16}),
    ],
)
def test_our_own_files_say_what_they_are(tmp_path, name, arguments):
    model = timm.create_model(name, **arguments).eval()
    state = model.state_dict()
    expected = {key: value for key, value in arguments.items() if key != "branches"}
    assert span.identify(state) == (name, expected)
    assert span.adapt(state, state) is state
    save_file(state, tmp_path / "own.safetensors")
    loaded = visionattn.load(tmp_path / "own.safetensors")
    x = torch.rand(1, model.in_chans, 5, 6)
    assert_near(loaded(x), model(x), 1e-3 if "branches" in arguments else 0)


def test_every_form_loads_into_every_form():
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    for first in (False, True):
        model = SPAN(width=4, scale=2, branches=first, dtype=torch.float64).eval()
        for second in (False, True):
            other = SPAN(width=4, scale=2, branches=second, dtype=torch.float64).eval()
            other.load_state_dict(model.state_dict())
            assert_near(other(x), model(x))
            assert (other.conv_1.conv is None) == second


def test_converting_is_exact_both_ways():
    state = SPAN(width=4, scale=2).state_dict()
    back = span.fuse(span.unfuse(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_files_are_fused_in_more_than_half():
    state = {key: value.half() for key, value in official().items()}
    exact = span.convert({key: value.double() for key, value in state.items()}, branches=False)
    found = span.convert(state, branches=False)
    for key, value in found.items():
        if key.endswith("conv.weight"):
            assert value.dtype == torch.float32
            assert torch.equal(value, exact[key].float())


def test_inside_another_network():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.upscaler = SPAN(width=4, scale=2)
            self.bias = nn.Parameter(torch.zeros(1))

    state = official()
    outer = Outer()
    outer.load_state_dict({"bias": torch.ones(1)} | {f"upscaler.{key}": value for key, value in state.items()})
    assert outer.bias.item() == 1
    x = torch.rand(1, 3, 5, 5)
    assert_near(outer.upscaler.double().eval()(x.double()), by_the_keys(state, x), 1e-4)


@pytest.mark.parametrize("extra", [{}, {"no_norm": torch.zeros(1)}])
def test_authors_layout_round_trip(extra):
    model = SPAN(width=5, scale=3, norm=not extra)
    written = span.to_official(model)
    expected = official(width=5, scale=3, **extra)
    assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in expected.items()}
    back = span.convert(written, branches=False)
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"branches": True}, {"norm": False}, {"cat_width": 3}, {"img_range": 1.0}, {"scale": 3, "width": 7}],
)
def test_spandrel_loads_what_we_write(arguments):
    loader = pytest.importorskip("spandrel", reason="spandrel is not installed").ModelLoader()
    model = SPAN(**{"width": 6, "scale": 2, **arguments}).eval()
    found = loader.load_from_state_dict({key: value.clone() for key, value in span.to_official(model).items()})
    assert (found.architecture.id, found.scale, found.input_channels) == ("SPAN", model.scale, 3)
    x = torch.rand(1, 3, 9, 8)
    expected = model(x)
    torch.testing.assert_close(found.model.eval()(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_spandrel_loads_published_fused_files_through_us():
    loader = pytest.importorskip("spandrel", reason="spandrel is not installed").ModelLoader()
    model = visionattn.load(published("team46_span.pth"))
    found = loader.load_from_state_dict(span.to_official(model))
    path = SHARED / "data" / "sr" / "Set5" / "LRbicx4" / "woman.png"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(found.model.eval()(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("va_spanf_x4"), "must be those of a SPAN"),
        (lambda: SPAN(width=4, in_chans=1), "requires 3 channels; this network has 1"),
        (lambda: SPAN(width=4, cat_width=5), "at most 4 outputs; this one has 5"),
    ],
)
def test_what_the_authors_layout_has_no_place_for(model, message):
    with pytest.raises(CheckpointError, match=message):
        span.to_official(model())


def test_what_is_no_span_is_said(tmp_path):
    torch.save({"feats.0.eval_conv.weight": torch.zeros(1), "feats.0.sk.weight": torch.zeros(1)}, tmp_path / "plus.pth")
    with pytest.raises(CheckpointError, match="SPANPlus"):
        visionattn.load(tmp_path / "plus.pth")
    assert span.identify({"a.weight": torch.zeros(1)}) is None
    cut = official(width=26)
    del cut["block_3.c2_r.conv.1.weight"]
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"fit va_span_ch26_x2: blocks\.2\.conv2\.conv\.weight is missing"):
        visionattn.load(tmp_path / "cut.pth")
    torch.save(official(width=26), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"fit va_span_ch28_x2: conv_1\.conv\.weight is .*26.*, not .*28"):
        visionattn.load(tmp_path / "whole.pth", name="va_span_ch28_x2")
    odd = official(width=26) | {"upsampler.0.weight": torch.zeros(7, 26, 3, 3)}
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="has 7 outputs"):
        visionattn.load(tmp_path / "odd.pth")


def test_a_name_in_another_form_is_told_what_is_missing():
    with pytest.raises(RuntimeError, match="no_norm"):
        SPAN(width=4, scale=2, norm=False).load_state_dict(official())
    with pytest.raises(RuntimeError, match=r"first\.conv1"):
        timm.create_model("va_spanf_x4").load_state_dict(official(width=32, scale=4))


@pytest.mark.parametrize("name", [file for file, *_ in PUBLISHED])
def test_published_network_exports(name, tmp_path):
    exported = export_onnx(visionattn.load(published(name)), tmp_path / "model.onnx")
    assert len({(row.height, row.width) for row in exported.rows}) == 3
    assert all(row.error < 1e-5 and row.spread > 0.3 for row in exported.rows)
