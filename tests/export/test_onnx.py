from __future__ import annotations

import os
import re
import resource

import numpy as np
import onnx
import pytest
import timm
import torch

from tests.export.contract import (
    ONE_LAYER_OF_A_KIND,
    ExportContract,
    draw_weights,
    export_by_name,
    smallest_names,
)
from tests.export.toys import Gated, OneSize, Pair, SpecialisedWidth, Toy
from visionattn.blocks import MinimalAttention
from visionattn.errors import ExportError, InputError, StorageError
from visionattn.export import OnnxModel, export_onnx, run
from visionattn.export.api import draw_random_weights


@pytest.fixture(scope="module", params=smallest_names())
def exported(request, tmp_path_factory):
    settings = ONE_LAYER_OF_A_KIND.get(request.param, {})
    return export_by_name(request.param, tmp_path_factory.mktemp("export"), **settings)


class TestNames(ExportContract):
    pass


class Mixing(Toy):
    """Attention of 8 x 8 patches in two heads."""

    def __init__(self, similarity: str, values: str) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, 4)
        self.attention = MinimalAttention(8, 2, similarity, values)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 8)."""
        return self.attention(self.conv(image).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize(
    ("similarity", "values"),
    [("pair", "projected"), ("shared", "identity"), ("collapsed", "shaped"), ("symmetric", "identity")],
)
def test_forms_of_minimal_attention(similarity, values, tmp_path):
    file = export_onnx(draw_weights(Mixing(similarity, values)), tmp_path / "model.onnx")
    assert max(row.error / row.spread for row in file.rows) < 2e-5
    assert len({(row.height, row.width) for row in file.rows}) == 3


def test_static_files_are_ready_for_quantisation(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization.shape_inference")
    model = draw_weights(Mixing("pair", "projected"))
    file = export_onnx(model, tmp_path / "model.onnx", batch=1, dynamic_size=False)
    quantization.quant_pre_process(str(file.path), str(tmp_path / "ready.onnx"))
    values = onnx.load(tmp_path / "ready.onnx").graph.value_info
    assert len(values) > 10
    assert all(dim.HasField("dim_value") for value in values for dim in value.type.tensor_type.shape.dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_LAYER_OF_A_KIND, "va_match_stereo_tiny", "va_match_flow_tiny"])
def test_networks_with_all_their_layers(name, tmp_path):
    file = export_by_name(name, tmp_path)
    assert file.spec.dynamic_axes == ["batch", "height", "width"]
    assert len({(row.height, row.width) for row in file.rows}) == 3


@pytest.mark.parametrize("name", [pytest.param("va_halonet_h0", marks=pytest.mark.slow), "va_halonet_h5"])
def test_halo_attention_is_open_in_every_size(name, tmp_path):
    """Stem, strides and a width of values of their own, one block in two stages; 14 divides none of h5's maps here."""
    two = {"depths": (1, 1), "widths": (64, 128), "heads": (4, 8), "stages": ("halo", "halo")}
    model = timm.create_model(name, **two)
    draw_random_weights(model, (96, 96))
    file = export_onnx(model, tmp_path / "model.onnx", input_size=(96, 96))
    assert file.spec.dynamic_axes == ["batch", "height", "width"]
    assert len({(row.height, row.width) for row in file.rows}) == 3
    nodes = [node.op_type for node in onnx.load(file.path).graph.node]
    assert nodes.count("Gather") >= 2 * 2  # keys and values of each attention: rows of a table of pixels
    assert not {"GatherElements", "GatherND", "ScatterND"} & set(nodes)


def test_a_map_of_one_window_is_open_in_every_size(tmp_path):
    """The number of windows along an axis is 1 at the native size: a trace there, or below, would hold it fixed."""
    model = timm.create_model("va_halonet_nano_32", **ONE_LAYER_OF_A_KIND["va_halonet_nano_32"])
    draw_random_weights(model, (4, 4))
    file = export_onnx(model, tmp_path / "model.onnx", input_size=(4, 4))
    assert len({(row.height, row.width) for row in file.rows}) == 3


def test_convolutional_network_of_timm(tmp_path):
    file = export_onnx(draw_weights(timm.create_model("test_resnet")), tmp_path / "model.onnx")
    assert file.spec.dynamic_axes == ["batch", "height", "width"]
    assert max(row.error / row.spread for row in file.rows) < 2e-5


def test_caller_keeps_the_model(tmp_path):
    model = Toy().train().to(torch.bfloat16)
    before = model.conv.weight.clone()
    file = export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    assert model.conv.weight.requires_grad
    assert model.conv.weight.dtype == torch.bfloat16
    assert torch.equal(model.conv.weight, before)
    weights = [onnx.numpy_helper.to_array(value) for value in onnx.load(file.path).graph.initializer]
    assert any(np.array_equal(weight, before.float().detach().numpy()) for weight in weights)


def test_operator_becomes_its_definition(tmp_path):
    model = Gated()
    file = export_onnx(model, tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(file.path).graph.node}
    assert "Sigmoid" in kinds
    assert not any("gate" in kind.lower() for kind in kinds)


def test_pair_of_inputs_in_steps(tmp_path):
    model = Pair().eval()
    file = export_onnx(model, tmp_path / "model.onnx")
    assert {(row.output, row.height, row.width) for row in file.rows} == {
        (output, *size) for output in ("map", "vector") for size in ((32, 32), (56, 24), (16, 16))
    }
    left, right = torch.rand(2, 2, 3, 40, 16)
    with torch.no_grad():
        expected = model(left, right)
    for result, reference in zip(run(file.path, left, right), expected, strict=True):
        np.testing.assert_allclose(result, reference.numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="at least 16 and divisible by 8"):
        run(file.path, left[..., :12], right[..., :12])
    with pytest.raises(InputError, match="left, right; got 1 arrays"):
        run(file.path, left)
    with pytest.raises(InputError, match="must have the same shape"):
        run(file.path, left, right[..., :8, :])


def test_fixed_size_model_is_static(tmp_path):
    file = export_onnx(OneSize(), tmp_path / "model.onnx")
    assert file.spec.dynamic_axes == ["batch"]
    assert [(row.batch, row.height, row.width) for row in file.rows] == [(1, 8, 8), (3, 8, 8)]
    assert run(file.path, np.ones((5, 3, 8, 8)))[0].shape == (5, 3)
    with pytest.raises(InputError, match="must be 8 x 8; got 9 x 8"):
        run(file.path, np.ones((1, 3, 9, 8)))


def test_static_size_on_request(tmp_path):
    file = export_onnx(SpecialisedWidth(), tmp_path / "model.onnx", dynamic_size=False, input_size=(20, 24))
    assert [(row.height, row.width) for row in file.rows] == [(20, 24)] * 2


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            SpecialisedWidth(),
            ExportError,
            "torch.export cannot export SpecialisedWidth with dynamic batch, height, width.*constant.*--static",
        ),
        (OneSize(), InputError, "fails in PyTorch at .*--static-size"),
    ],
)
def test_refused_dynamic_size_is_never_baked(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "model.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10), (23, 11)])
def test_oldest_ir_version_of_the_opset(opset, ir_version, tmp_path):
    """ONNX Runtime 1.17 reads IR 9, and 1.14 IR 8."""
    content = onnx.load(export_onnx(Toy(), tmp_path / "model.onnx", opset=opset).path)
    assert content.ir_version == ir_version
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", opset)]


def test_fixed_batch(tmp_path):
    file = export_onnx(Toy(), tmp_path / "model.onnx", batch=2, dynamic_size=False)
    content = onnx.load(file.path)
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*content.graph.input, *content.graph.output]
    ]
    assert shapes == [[2, 3, 32, 32], [2, 3]]  # nothing is dynamic, as NNAPI asks
    assert file.spec.dynamic_axes == []
    assert OnnxModel(file.path).spec.batch == 2
    assert [row.batch for row in file.rows] == [2, 2]
    assert run(file.path, np.ones((2, 3, 32, 32)))[0].shape == (2, 3)
    with pytest.raises(InputError, match="must be 2; got 1"):
        run(file.path, np.ones((1, 3, 32, 32)))
    free = export_onnx(Toy(), tmp_path / "free.onnx", batch=1)
    assert free.spec.dynamic_axes == ["height", "width"]
    assert {(row.batch, row.height) for row in free.rows} == {(1, row.height) for row in free.rows}


def test_labels_are_those_of_the_weights(tmp_path):
    model = Toy()
    model.pretrained_cfg = {**Toy.pretrained_cfg, "label_names": ("cat", "dög", "hen")}
    assert OnnxModel(export_onnx(model, tmp_path / "a.onnx").path).spec.labels == ["cat", "dög", "hen"]
    model.pretrained_cfg["label_names"] = ("cat", "dog")  # of another number of classes
    assert OnnxModel(export_onnx(model, tmp_path / "b.onnx").path).spec.labels is None


def test_steps_are_told(tmp_path):
    told = []
    export_onnx(Toy(), tmp_path / "model.onnx", progress=told.append)
    steps = ["Exporting Toy, step 1 of 3", "Step 2 of 3", "Step 3 of 3"]
    assert [line.partition(":")[0] for line in told[:3]] == steps
    assert [line[:17] for line in told[3:]] == [f"Comparison {one} of 6" for one in (1, 3, 5)]
    assert re.search(r"translating \d+ operations, about \d+ s\.", told[1])
    assert told[2].endswith("at 3 sizes.")


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match=r"operator set must be from 18 to .*; got 9"):
        export_onnx(Toy(), tmp_path / "model.onnx", opset=9)
    with pytest.raises(InputError, match="at least 16 and divisible by 8"):
        export_onnx(Pair(), tmp_path / "model.onnx", input_size=(20, 24))
    with pytest.raises(ExportError, match="returns 2 outputs, but has the output names logits"):
        export_onnx(type("Unnamed", (Pair,), {"output_names": ("logits",)})(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_unwritable_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Could not write"):
        export_onnx(Toy(), tmp_path / "file" / "model.onnx")


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(StorageError, match="Could not write"):
            export_onnx(Toy(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "old"


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    return export_onnx(Toy(), tmp_path_factory.mktemp("toy") / "model.onnx").path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.ones((1, 1, 32, 32)),
            r"must have the shape \(batch, 3, height, width\), .* RGB order; got \(1, 1, 32, 32\)",
        ),
        (np.ones((3, 32, 32)), r"got \(3, 32, 32\)"),
        (np.ones((1, 3, 32, 32), np.uint8), r"must be floats.*mean \[0.5, 0.4, 0.3\].*got uint8"),
    ],
)
def test_wrong_input(toy_file, array, message):
    with pytest.raises(InputError, match=message):
        run(toy_file, array)


def test_wrong_file(toy_file, tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        OnnxModel(tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(toy_file.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot load"):
        OnnxModel(broken)
    foreign = onnx.load(toy_file)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="does not have the metadata"):
        OnnxModel(tmp_path / "foreign.onnx")
    renamed = onnx.load(toy_file)
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "picture"
    onnx.save(renamed, tmp_path / "renamed.onnx")
    with pytest.raises(InputError, match=r"inputs or outputs of .* differ from its metadata: picture, logits"):
        OnnxModel(tmp_path / "renamed.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    with open(tmp_path / "huge.onnx", "wb") as huge:
        huge.truncate(2**32)
    for path, message in (
        (tmp_path, "There is no file"),
        (tmp_path / "pipe.onnx", "There is no file"),
        (tmp_path / "huge.onnx", "has 4.3 GB"),
        ("n" * 300, "File name too long"),
        ("n\0ul", "There is no file"),
    ):
        with pytest.raises(InputError, match=message):
            OnnxModel(path)


def test_half_precision_of_another_tool(toy_file, tmp_path):
    convert_float_to_float16 = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    path = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(toy_file)), path)
    file, images = OnnxModel(path), np.random.default_rng(0).random((2, 3, 40, 24), np.float32)
    assert file.session.get_inputs()[0].type == "tensor(float16)"
    (logits,) = file(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, run(toy_file, images)[0], atol=2e-3)
