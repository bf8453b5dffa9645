"""Graphs that read their weights from a safetensors file: the same outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from safetensors.torch import save_file  # noqa: E402

from tools.external_weights import refer_to_weights  # noqa: E402
from visionattn.export.half import halve_weights  # noqa: E402


class Toy(nn.Module):
    """A convolution, a product whose weight the exporter transposes, and two layers of equal weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second = nn.Linear(32, 48), nn.Linear(32, 48)
        self.second.load_state_dict(self.first.state_dict())
        self.back = nn.Conv2d(48, 3, 1)

    def forward(self, image):
        x = self.conv(image).movedim(1, 3)
        return self.back((self.first(x) * self.second(x).sigmoid()).movedim(3, 1))


@pytest.fixture
def written(tmp_path):
    torch.manual_seed(0)
    network = Toy().half().float().eval()
    weights = tmp_path / "toy.safetensors"
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, weights)
    path = tmp_path / "toy.onnx"
    torch.onnx.export(network, (torch.rand(1, 3, 8, 8),), path, dynamo=True, external_data=False, verbose=False)
    return path, weights


def run(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    return session.run(None, {session.get_inputs()[0].name: image})[0]


@pytest.mark.parametrize("half", [False, True])
def test_outputs_are_the_same(written, half):
    path, weights = written
    expected = run(path)
    model = onnx.load(path)
    if half:
        halve_weights(model)
    before = model.ByteSize()
    refer_to_weights(model, weights)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert sorted(tuple(tensor.dims) for tensor in external) == [(32, 3, 3, 3), (48, 32), (48, 32)]
    assert before - model.ByteSize() > 1.5 * 32 * 48
    onnx.save(model, path)
    np.testing.assert_array_equal(run(path), expected)


def test_other_weights_are_refused(written, tmp_path):
    path, _ = written
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.rand(32, 48)}, other)
    with pytest.raises(ValueError, match="No weight of the graph is in"):
        refer_to_weights(onnx.load(path), other)
