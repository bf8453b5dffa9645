from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from rich.console import Console

from tests.export import graphs
from visionattn.errors import DataError, InputError
from visionattn.export import OnnxModel, variants
from visionattn.export.variants import print_variants, variant_path, write_variants


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Source, output folder and variants of an upscaler, uint8 in and out."""
    folder = tmp_path_factory.mktemp("variants")
    source = graphs.upscaler(folder / "source.onnx")
    found = write_variants(source, folder / "out" / "net.onnx", int8=True, fp16=True, preprocess=True)
    return source, folder / "out", found


def test_files_and_their_metadata(written):
    source, folder, found = written
    assert [variant.path.name for variant in found] == ["net.onnx", "net.int8.onnx", "net.fp16.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(variant.path.name for variant in found)
    for variant, precision in zip(found, ("fp32", "int8", "fp16"), strict=True):
        spec = OnnxModel(variant.path).spec
        assert spec == variant.spec
        assert (spec.precision, spec.input_type, spec.output_kind) == (precision, "uint8", "image")
        assert variant.bytes == variant.path.stat().st_size
        assert onnx.load(variant.path).ir_version == 9
    assert OnnxModel(source).spec.precision is None  # it stays


def test_each_was_measured(written):
    _, _, (first, int8, fp16) = written
    assert first.quality.metric == "PSNR-Y in dB"
    assert first.quality.loss == pytest.approx(0, abs=1e-4)
    assert -0.01 < int8.quality.loss <= 0.06
    assert abs(fp16.quality.loss) < 1e-3
    assert {variant.quality.count for variant in written[2]} == {16}
    assert all(variant.speed > 0 and variant.spread >= 0 for variant in written[2])
    assert not any(variant.refused for variant in written[2])


def test_they_compute_nearly_the_same(written):
    pictures = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    expected, *others = (OnnxModel(variant.path)(pictures)[0].astype(int) for variant in written[2])
    assert expected.shape == (1, 40, 60, 3)
    for result in others:
        assert np.abs(result - expected).max() <= 4


def test_real_data_of_ones_own_and_the_format_of_onnx_runtime(tmp_path):
    source = graphs.classifier(tmp_path / "source.onnx")
    generator = np.random.default_rng(0)
    for name in range(8):
        (tmp_path / "classes" / f"class{name % 4}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "classes" / f"class{name % 4}" / f"{name}.png")
    lines: list[str] = []
    found = write_variants(source, tmp_path / "net.ort", int8=tmp_path / "classes", progress=lines.append)
    assert [variant.path.name for variant in found] == ["net.ort", "net.int8.ort"]
    assert {variant.quality.metric for variant in found} == {"accuracy in %"}
    assert found[0].quality.count == 8
    images = generator.normal(size=(2, 3, 32, 32)).astype(np.float32)
    for variant, tolerance in zip(found, (1e-5, 0.1)):
        assert OnnxModel(variant.path).spec.precision == variant.spec.precision
        np.testing.assert_allclose(OnnxModel(variant.path)(images)[0], OnnxModel(source)(images)[0], atol=tolerance)
    assert "Quantising to int8." in lines


def test_what_loses_too_much_is_not_written(tmp_path, monkeypatch):
    source = graphs.upscaler(tmp_path / "net.onnx")

    def ruined(path):
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.name == "last.weight":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones((12, 8, 1, 1), np.float32), tensor.name))
        return model

    monkeypatch.setattr(variants, "to_half", ruined)
    first, fp16 = write_variants(source, fp16=True)
    assert first.path == source
    assert not fp16.recommended
    assert fp16.refused.startswith("PSNR-Y in dB")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    console = Console(file=io.StringIO(), width=200)
    print_variants((first, fp16), console)
    printed = console.file.getvalue()
    assert "REFUSED" in printed
    assert "net.fp16.onnx was not written: PSNR-Y in dB" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [("net.tflite", "must end in .onnx or .ort or .pt2"), ("net.pt2", "has no variants"), ("taken.onnx", "exists")],
)
def test_outputs_are_refused_before_the_work(name, message, written, tmp_path):
    (tmp_path / "taken.fp16.onnx").write_text("mine")
    with pytest.raises(InputError, match=message):
        write_variants(written[0], tmp_path / name, fp16=True)
    assert (tmp_path / "taken.fp16.onnx").read_text() == "mine"


def test_three_images_are_too_few(written, tmp_path):
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match="contains 3 images; calibration needs at least 8"):
        write_variants(written[0], tmp_path / "net.onnx", int8=tmp_path)


def test_a_variant_has_no_variants(written, tmp_path):
    shutil.copy(written[2][2].path, tmp_path / "half.onnx")
    with pytest.raises(InputError, match="is itself a variant: give the float32 file"):
        write_variants(tmp_path / "half.onnx", fp16=True)


def test_names():
    assert variant_path("a/net.v2.onnx", "int8") == Path("a/net.v2.int8.onnx")
    assert variant_path("net.onnx", "fp32") == Path("net.onnx")
