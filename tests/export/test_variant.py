from __future__ import annotations

from pathlib import Path

import onnx

from tests.export import graphs
from visionattn.export.examples import load_examples
from visionattn.export.quality import Reference
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec
from visionattn.export.variant import Variant, write_variant


def test_the_float32_file_is_its_own_reference(tmp_path):
    source = graphs.upscaler(tmp_path / "source.onnx")
    spec = OnnxModel(source).spec
    reference = Reference(source, spec, load_examples(spec, None)[:2])
    lines: list[str] = []
    variant = write_variant(onnx.load(source), spec, "fp32", tmp_path / "net.onnx", reference, progress=lines.append)
    assert lines == []  # nothing is left to measure
    assert (variant.quality, variant.speed, variant.refused) == (reference.quality, 1.0, "")
    assert variant.quality.loss == 0
    assert OnnxModel(tmp_path / "net.onnx").spec == variant.spec
    assert variant.spec.precision == "fp32"
    assert variant.bytes == (tmp_path / "net.onnx").stat().st_size


def test_no_gain_is_said():
    spec = ExportSpec.of(graphs.Facts(), None, True, 20, "drawn", None)
    slow = Variant(Path("net.int8.onnx"), spec, 1000, speed=0.77, recommended=False)
    assert slow.describe().endswith("0.77 times the speed of float32 here: no gain on this processor, not recommended.")
