"""SPAN files of ncnn: the pair is read as the network that it was written from, and damage is named."""

import struct

import pytest
import torch

import visionattn
from visionattn.errors import CheckpointError
from visionattn.models.span import SPAN
from visionattn.weights import span
from visionattn.weights.ncnn import HALF, RGB_MEAN


def fused():
    """Weights of a small SPAN in the authors' fused layout."""
    state = span.to_official(SPAN(width=5, scale=2))
    return {key: value for key, value in state.items() if ".sk." not in key and ".conv." not in key}


def write_ncnn(state, path, half=True, mean=True):
    """The pair of files as ncnn's converter writes it."""
    lines, data = [], b""
    if mean:
        lines.append("MemoryData mean 0 1 mean 0=1 1=1 11=1 2=3")
        data += struct.pack("<3f", *RGB_MEAN)
    for key, weight in state.items():
        if not key.endswith(".weight"):
            continue
        layer = key.removesuffix(".weight")
        name = "/upsampler/upsampler.0" if layer == "upsampler.0" else "/" + layer.replace(".", "/")
        out_chans, _, side, _ = weight.shape
        lines.append(f"Convolution {name}/Conv 1 1 a b 0={out_chans} 1={side} 4={side // 2} 5=1 6={weight.numel()}")
        lines.append("Swish /act/Mul 1 1 b c")
        values = weight.numpy().astype("<f2" if half else "<f4").tobytes()
        data += struct.pack("<I", HALF if half else 0) + values + b"\0" * (-len(values) % 4)
        data += state[f"{layer}.bias"].numpy().tobytes()
    path.with_suffix(".param").write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n")
    path.with_suffix(".bin").write_bytes(data)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("suffix", [".param", ".bin"])
def test_ncnn_pair(tmp_path, half, mean, suffix):
    state = fused()
    write_ncnn(state, tmp_path / "net.bin", half, mean)
    model = visionattn.load(tmp_path / f"net{suffix}")
    assert (model.scale, model.num_features, "no_norm" in model.state_dict()) == (2, 5, not mean)
    expected = span.convert(state)
    for key, value in expected.items():
        rounded = value.half().float() if half and key.endswith("weight") else value
        assert torch.equal(model.state_dict()[key], rounded)


def test_damaged_ncnn_pairs(tmp_path):
    state = fused()
    write_ncnn(state, tmp_path / "net.bin")
    data = (tmp_path / "net.bin").read_bytes()
    for damaged, message in [
        (data[:-3], "does not match .*net.param"),
        (data + b"1234", "requires"),
        (data[:12] + b"abcd" + data[16:], "tag 0x64636261"),
    ]:
        (tmp_path / "net.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            visionattn.load(tmp_path / "net.bin")
    (tmp_path / "net.bin").unlink()
    with pytest.raises(CheckpointError, match=r"There is no file .*net\.bin: ncnn stores"):
        visionattn.load(tmp_path / "net.param")
    (tmp_path / "other.param").write_text("hello")
    (tmp_path / "other.bin").write_text("hello")
    with pytest.raises(CheckpointError, match="not a network of ncnn"):
        visionattn.load(tmp_path / "other.bin")


def test_other_means_are_refused(tmp_path):
    state = fused()
    write_ncnn(state, tmp_path / "net.bin")
    data = (tmp_path / "net.bin").read_bytes()
    (tmp_path / "net.bin").write_bytes(struct.pack("<3f", 0.5, 0.5, 0.5) + data[12:])
    with pytest.raises(CheckpointError, match=r"mean of 0\.5, 0\.5, 0\.5"):
        visionattn.load(tmp_path / "net.bin")
