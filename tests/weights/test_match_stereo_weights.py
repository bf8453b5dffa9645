"""Files of MatchStereo and MatchFlow: which network they are, and that every number gets to its place."""

import csv
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visionattn
from visionattn.errors import CheckpointError
from visionattn.models.match_stereo import MatchFlow, MatchStereo
from visionattn.weights import match_stereo

# Keys and shapes of the authors' files: a line a key, a column a size.
KEYS = Path(__file__).parent / "published" / "match_stereo.tsv"
FEW = (1, 1, 2, 1)
# The authors' name of each of our layers; blocks of the encoder, layers of the decoder and what is in them keep theirs.
THEIRS = {
    "encoder.stem": "encoder.downsample_layers.0",
    "encoder.downsamplings.0": "encoder.downsample_layers.1",
    "encoder.downsamplings.1": "encoder.downsample_layers.2",
    "encoder.downsamplings.2": "encoder.downsample_layers.3",
    "start": "init_correlation_volume",
    "fusions.0": "up_decoders.1",
    "fusions.1": "up_decoders.2",
    "fusions.2": "up_decoders.3",
    "upsamplings.0.mask": "up_masks.1",
    "upsamplings.1.mask": "up_masks.2",
    "upsamplings.2.mask": "up_masks.3",
    "upsamplings.3.mask": "up_masks.4",
    "decoder.0": "match_attentions.0.layers",
    "decoder.1": "match_attentions.1.layers",
    "decoder.2": "match_attentions.2.layers",
    "decoder.3": "match_attentions.3.layers",
}


def random_weights(model):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def official(own, widths):
    """A file as the authors write it, with the 18 tensors that nothing reads."""
    state = {}
    for key, value in own.items():
        place = next((place for place in THEIRS if key.startswith(f"{place}.")), "")
        name = THEIRS[place] + key.removeprefix(place) if place else key
        if key != "flow":
            state[name.replace("_cross.g.", "_cross.g.0.")] = value
    for key in own:
        if found := re.match(r"encoder\.stages\.([23])\.\d+\.norm(\d)", key):
            scale = key.replace(f"norm{found[2]}.weight", f"res_scale{found[2]}.scale")
            state[scale] = torch.randn(widths[int(found[1])])
    state["encoder.head.weight"], state["encoder.head.bias"] = torch.randn(1000, widths[-1]), torch.randn(1000)
    return {"model": state}


def assert_loaded(model, own):
    found = model.state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(found[key], value) for key, value in own.items() if key != "flow")


def made(network=MatchStereo, widths=(32, 64, 128, 160), depths=FEW):
    model = network(widths=widths, depths=depths, device="meta")
    own = random_weights(model)
    return own, official(own, widths)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("task", ["stereo", "flow"])
def test_keys_and_shapes_are_the_published_ones(size, task):
    if (size, task) == ("small", "flow"):
        pytest.skip("there is no such model")
    with KEYS.open(newline="") as file:
        listed = {row["key"]: row[size].split("x") for row in csv.DictReader(file, delimiter="\t")}
    state = {key: torch.empty([int(length) for length in shape], device="meta") for key, shape in listed.items()}
    assert len(state) == 646
    own = match_stereo.convert(state)
    name = f"va_match_{task}_{size}"
    wanted = timm.create_model(name, device="meta").state_dict()
    wanted.pop("flow", None)
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in wanted.items()}
    assert len(own) == 646 - 18
    assert match_stereo.identify(state, name) == (name, {})
    # The layout written out in this file is the same.
    written = official(wanted, match_stereo.VARIANTS[size]["widths"])["model"]
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_official_file_loads_in_every_way(tmp_path, kind):
    own, content = made()
    path = tmp_path / f"net.{kind}"
    save_file(content["model"], path) if kind == "safetensors" else torch.save(content, path)
    loaded = visionattn.load(path)
    assert loaded.pretrained_cfg["architecture"] == "va_match_stereo_tiny"
    assert not loaded.training
    assert_loaded(loaded, own)
    assert_loaded(timm.create_model("va_match_stereo_tiny", depths=FEW, checkpoint_path=str(path)), own)
    bare = timm.create_model("va_match_stereo_tiny", depths=FEW)
    bare.load_state_dict(dict(content))
    assert_loaded(bare, own)


def test_full_tiny_file_and_its_first_layers(tmp_path):
    own, content = made(depths=(8, 8, 8, 2))
    assert len(content["model"]) == 646
    torch.save(content, tmp_path / "net.pth")
    loaded = visionattn.load(tmp_path / "net.pth")
    assert_loaded(loaded, own)
    direct = timm.create_model("va_match_stereo_tiny").eval()
    direct.load_state_dict(own)
    views = torch.rand(2, 1, 3, 161, 170)
    with torch.no_grad():
        assert torch.equal(loaded(*views), direct(*views))
    first = {key: value for key, value in own.items() if not re.match(r"decoder\.(\d\.[4-7]|3\.1)\.", key)}
    assert_loaded(visionattn.load(tmp_path / "net.pth", depths=(4, 4, 4, 1)), first)
    model = timm.create_model("va_match_stereo_tiny", depths=(4, 4, 4, 1), checkpoint_path=str(tmp_path / "net.pth"))
    assert_loaded(model, first)


def test_flow_needs_its_name(tmp_path):
    own, content = made(MatchFlow)
    torch.save(content, tmp_path / "net.pth")
    assert isinstance(visionattn.load(tmp_path / "net.pth"), MatchStereo)
    flow = visionattn.load(tmp_path / "net.pth", name="va_match_flow_tiny")
    assert isinstance(flow, MatchFlow)
    assert_loaded(flow, own)


def test_our_own_files_say_what_they_are(tmp_path):
    for network, name in ((MatchStereo, "va_match_stereo_tiny"), (MatchFlow, "va_match_flow_tiny")):
        own, _ = made(network)
        assert match_stereo.identify(own) == (name, {"depths": FEW})
        assert match_stereo.adapt(own, own) is own
        save_file(own, tmp_path / "own.safetensors")
        assert type(visionattn.load(tmp_path / "own.safetensors")) is network
        other = "va_match_flow_tiny" if network is MatchStereo else "va_match_stereo_tiny"
        with pytest.raises(CheckpointError, match=r"flow is (missing|unknown)"):
            visionattn.load(tmp_path / "own.safetensors", name=other, depths=FEW)


def test_settings_come_from_the_shapes():
    nano = timm.create_model("va_match_stereo_nano", device="meta").state_dict()
    assert match_stereo.identify(nano) == ("va_match_stereo_nano", {})
    nano = timm.create_model("va_match_flow_nano", device="meta").state_dict()
    assert match_stereo.identify(nano) == ("va_match_flow_nano", {})
    odd = {"widths": (8, 12, 16, 24), "encoder_depths": (1, 2, 1, 1), "depths": (1, 11, 1, 1)}
    for network, name in ((MatchStereo, "va_match_stereo_tiny"), (MatchFlow, "va_match_flow_tiny")):
        assert match_stereo.identify(network(**odd, device="meta").state_dict()) == (name, odd)
    assert match_stereo.identify({"a": torch.ones(1)}) is None


def test_inside_another_network():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.matcher = MatchFlow(depths=FEW)
            self.bias = nn.Parameter(torch.zeros(1))

    own, content = made(MatchFlow)
    outer = Outer()
    outer.load_state_dict({"bias": torch.ones(1)} | {f"matcher.{k}": value for k, value in content["model"].items()})
    assert outer.bias.item() == 1
    assert_loaded(outer.matcher, own)


def test_incomplete_and_foreign_files_are_told(tmp_path):
    _, content = made()
    del content["model"]["match_attentions.1.layers.0.norm0.weight"]
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(
        CheckpointError, match=r"does not fit va_match_stereo_tiny: decoder\.1\.0\.norm0\.weight is mis"
    ):
        visionattn.load(tmp_path / "net.pth")
    del content["model"]["encoder.stages.1.0.norm1.weight"]
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"look like a MatchStereo's, but encoder\.stages\.1\.0\.norm1"):
        visionattn.load(tmp_path / "net.pth")
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.stem"):
        MatchStereo(depths=FEW).load_state_dict({"a": torch.ones(1)})
