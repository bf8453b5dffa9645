"""Every mixer against the contract, and its limit."""

import io

import onnxruntime
import pytest
import torch

from tests.mixers.contract import CASES, DIM, GRID, HEADS, LIMITS, MixerContract, OnMaps, make, tokens
from visionattn.kernels import PlainForms
from visionattn.mixers import MIXERS


class TestEveryMixer(MixerContract):
    pass


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_limit_is_softmax_attention(name):
    torch.manual_seed(0)
    mixer = MIXERS[name](DIM, HEADS, **LIMITS[name], dtype=torch.float64)
    softmax = MIXERS["softmax"](DIM, HEADS, dtype=torch.float64)
    missing, unexpected = mixer.load_state_dict(softmax.state_dict(), strict=False)
    assert unexpected == []
    assert sum(mixer.get_parameter(key).numel() for key in missing) == mixer.extra_parameters()
    x = tokens(mixer, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, GRID), softmax(x, GRID), rtol=0, atol=1e-10)


QUICK = ("dma", "agent")
EXPORTED = [
    pytest.param(name, settings, id=f"{name}-{number}", marks=[] if name in QUICK else [pytest.mark.slow])
    for number, (name, settings) in enumerate(CASES)
    if "onnx" in MIXERS[name].supports
]


@pytest.mark.parametrize(("name", "settings"), EXPORTED)
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_at_other_sizes(name, settings):
    layer = OnMaps(make(name, settings))
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with PlainForms():
        program = torch.export.export(layer, (torch.randn(2, DIM, 9, 19),), dynamic_shapes=(axes,))
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    cancels = settings.get("orders") == "separate"  # divides by sums that cancel
    for size in [(1, DIM, 11, 23), (3, DIM, 4, 5), (2, DIM, 1, 7)]:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, layer(x), rtol=1e-2 if cancels else 1e-4, atol=1e-2 if cancels else 1e-5)
