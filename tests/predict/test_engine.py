"""What computes a tile: precision and its fallback, ONNX Runtime against PyTorch, the choice between them."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from tests.export import graphs
from tests.predict.upscalers import Blur, Repeat
from visionattn.errors import InputError
from visionattn.export import OnnxModel, export_onnx
from visionattn.export.variants import write_variants
from visionattn.predict import engine as engines
from visionattn.predict.engine import OnnxEngine, TorchEngine, default_name, faster


@pytest.fixture
def images():
    return torch.rand(1, 3, 12, 14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_it(images, dtype):
    engine = TorchEngine(Blur(), dtype)
    result, exact = engine(images), Blur()(images)
    assert result.dtype == torch.float32
    assert 0 < (result - exact).abs().max() < 0.01
    assert engine.notes == []


def test_auto_on_a_cpu_is_the_weights_own(images):
    assert torch.equal(TorchEngine(Blur())(images), Blur()(images))
    assert TorchEngine(Blur().double()).dtype == torch.float64


def test_what_overflows_is_computed_again(images):
    model = Repeat()
    model.spread.weight.data *= 1e6
    engine = TorchEngine(model, "fp16")
    torch.testing.assert_close(engine(images), model(images))
    assert engine.notes == ["float16 overflowed"]


def test_a_model_in_training_is_left_in_it(images):
    model = nn.Sequential(Repeat(), nn.Dropout())
    model.task, model.scale, model.in_chans, model.radius = "restore", 2, 3, 0
    result = TorchEngine(model)(images)
    assert model.training
    assert torch.equal(result, Repeat()(images))


def test_another_task_is_named():
    classifier = timm.create_model("va_minimal_vit_nano_patch7_28")
    with pytest.raises(InputError, match="MinimalVisionTransformer cannot be used here: it is a 'classify' model"):
        TorchEngine(classifier)
    with pytest.raises(
        InputError, match="Conv2d cannot be used here: it states no task; a 'restore' model is required"
    ):
        TorchEngine(nn.Conv2d(3, 3, 1))
    unfinished = Repeat()
    del unfinished.scale
    with pytest.raises(InputError, match="Repeat lacks the attributes scale"):
        TorchEngine(unfinished)


def test_an_exported_file_is_the_model(tmp_path):
    model = timm.create_model("va_span_ch26_x2").eval()
    export_onnx(model, tmp_path / "span.onnx", check=False)
    engine = OnnxEngine(OnnxModel(tmp_path / "span.onnx"))
    assert (engine.scale, engine.channels, engine.radius) == (2, 3, 21)
    smooth = torch.linspace(0.2, 0.8, 25 * 33).view(1, 1, 25, 33).repeat(1, 3, 1, 1)
    torch.testing.assert_close(engine(smooth), model(smooth).detach(), atol=1e-4, rtol=1e-4)


def test_variants_upscale(tmp_path):
    source = graphs.upscaler(tmp_path / "toy.onnx")
    write_variants(source, tmp_path / "net.onnx", int8=True, preprocess=True)
    outline = timm.create_model("va_span_ch26_x2").eval()
    pictures = torch.randint(256, (1, 3, 20, 24), generator=torch.Generator().manual_seed(0)) / 255
    expected = pictures.repeat_interleave(2, -1).repeat_interleave(2, -2)
    for name, tolerance in (("toy.onnx", 1e-5), ("net.onnx", 1e-6), ("net.int8.onnx", 3 / 255)):
        engine = OnnxEngine(OnnxModel(tmp_path / name), outline)
        assert engine.radius == 1
        torch.testing.assert_close(engine(pictures), expected, atol=tolerance, rtol=0)


def test_files_that_do_not_upscale():
    spec = SimpleNamespace(task="classify", model="va_minimal_vit_nano_patch7_28", dynamic_size=True)
    with pytest.raises(InputError, match="its task is 'classify'"):
        OnnxEngine(SimpleNamespace(spec=spec))
    spec = SimpleNamespace(task="restore", model="va_span_ch26_x2", dynamic_size=False)
    with pytest.raises(InputError, match="export it without --static-size"):
        OnnxEngine(SimpleNamespace(spec=spec))


class Fake:
    def __init__(self, result):
        self.result = result

    def __call__(self, images):
        return self.result


def test_the_faster_one_is_taken_if_it_agrees(images, monkeypatch):
    mine = TorchEngine(Blur())
    result = mine(images)
    times = {}
    monkeypatch.setattr(engines, "_timed", lambda engine, images: (engine(images), times[engine]))
    for seconds, offset, taken, reason in [
        (0.5, 0.0, True, "ONNX Runtime: 1.00 s per tile in PyTorch, 0.50 s in ONNX Runtime"),
        (2.0, 0.0, False, "PyTorch: 1.00 s per tile"),
        (0.5, 0.1, False, "differ by 0.1"),
        (0.5, float("nan"), False, "differ by nan"),
    ]:
        other = Fake(result + offset)
        times = {mine: 1.0, other: seconds}
        monkeypatch.setattr(OnnxEngine, "of", lambda model, other=other: other)
        chosen, told = faster(mine, images)
        assert chosen is (other if taken else mine)
        assert reason in told


def test_an_export_that_fails_leaves_torch(images, monkeypatch):
    def fail(model):
        raise InputError("no way")

    monkeypatch.setattr(OnnxEngine, "of", fail)
    engine = TorchEngine(Blur())
    assert faster(engine, images) == (engine, "PyTorch: no way")


def test_a_model_is_exported_for_the_run(images):
    engine = OnnxEngine.of(Blur().eval())
    torch.testing.assert_close(engine(images), Blur()(images).detach(), atol=1e-5, rtol=1e-4)


def test_default_names():
    assert [default_name(scale) for scale in (2, 3, 4)] == ["va_span_ch26_x2", "va_span_ch26_x3", "va_span_ch26_x4"]
    with pytest.raises(InputError, match="No weights are shipped for x8, only for x2, x3, x4"):
        default_name(8)
