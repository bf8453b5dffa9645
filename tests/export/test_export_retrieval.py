"""Attribute retrieval in two files: free batch, tokens and number of attributes, names, mistakes."""

import argparse
import copy
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch

from tests.export.contract import draw_weights
from visionattn.errors import ExportError, InputError, UnknownNameError
from visionattn.export import OnnxModel, OnnxRetrieval, export_retrieval
from visionattn.export.budget import Budget
from visionattn.export.check_pair import check_pair
from visionattn.export.cli import add_arguments
from visionattn.export.cli import run as export
from visionattn.export.pair import pair_paths

ATTRIBUTES = ["colour", "kind", "season", "pattern"]


def build(name="va_cca_minimal_vit_nano_patch4_32", **kwargs):
    little = {"attributes": ATTRIBUTES, "backbone_args": {"depth": 1}}
    return draw_weights(timm.create_model(name, **{**little, **kwargs})).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, path = build(), tmp_path_factory.mktemp("retrieval") / "clothes.onnx"
    return model, path, export_retrieval(model, path, weights="drawn", license="apache-2.0")


def test_pair_equals_the_model(exported):
    model, path, (tower, head) = exported
    assert [tower.path, head.path] == [*pair_paths(path)]
    assert sorted(file.name for file in path.parent.iterdir()) == ["clothes.head.onnx", "clothes.tower.onnx"]
    assert {(row.batch, row.output) for row in head.rows} == {
        (batch, f"embeddings, {count} of 4 attributes") for batch in (1, 3, 4) for count in (1, 3, 4)
    }
    assert len({(row.height, row.width) for row in head.rows}) == 3
    assert max(row.error for row in head.rows) < 1e-5
    assert min(row.spread for row in head.rows) > 1e-2
    assert {row.output for row in tower.rows} == {"tokens"}
    pair, images = OnnxRetrieval(path), torch.rand(5, 3, 48, 36)
    with torch.no_grad():
        for conditions in (None, ["pattern"], ["season", 0, "colour", "kind", "kind"]):
            expected = model(images, conditions).numpy()
            np.testing.assert_allclose(pair(images, conditions), expected, rtol=0, atol=1e-5)
        tokens = pair.tokens(images)
        np.testing.assert_allclose(pair.embed(tokens[:1], [2]), model(images[:1], [2]).numpy(), rtol=0, atol=1e-5)


def test_attention_over_places(tmp_path):
    """The other head that is more than a product of matrices."""
    _, file = export_retrieval(build(head="asen"), tmp_path / "model.onnx", dynamic_size=False)
    assert len(file.rows) == 9
    assert max(row.error for row in file.rows) < 1e-5


def test_graphs_are_plain_and_open(exported):
    model, _, files = exported
    inputs = [
        {"image": ["batch", 3, "height", "width"]},
        {"tokens": ["batch", "tokens", 64], "conditions": ["conditions"]},
    ]
    for file, expected in zip(files, inputs):
        graph = onnx.load(file.path).graph
        assert {node.domain for node in graph.node} == {""}
        found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
        assert found == expected
        assert b"site-packages" not in file.path.read_bytes()
        spec = OnnxModel(file.path).spec
        assert spec.attributes == ATTRIBUTES
        assert (spec.task, spec.weights, spec.license) == ("retrieve", "drawn", "apache-2.0")
        assert spec.input_size == [3, 32, 32]
        assert spec.model == "va_cca_minimal_vit_nano_patch4_32"
    # Each holds its own weights and no others.
    for file, part in zip(files, (model.backbone, model.head)):
        weights = sum(4 * p.numel() for p in part.parameters())
        assert 0.9 * weights < file.bytes < weights + 60_000


def test_fixed_batch(tmp_path):
    model = build()
    tower, head = export_retrieval(model, tmp_path / "model.onnx", batch=2, dynamic_size=False)
    assert tower.spec.dynamic_axes == []
    assert head.spec.dynamic_axes == ["conditions"]
    assert {row.batch for row in head.rows} == {2}
    pair, images = OnnxRetrieval(tmp_path / "model.onnx"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(pair(images, [1]), model(images, [1]).numpy(), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="must be 2; got 1"):
        pair.embed(pair.tokens(images)[:1])


def test_mistakes(exported, tmp_path):
    model, path, _ = exported
    pair = OnnxRetrieval(path)
    for wrong in ("color", 4, -1):
        with pytest.raises(UnknownNameError, match="must be one of 'colour', 'kind', 'season', 'pattern'; got"):
            pair(torch.rand(1, 3, 32, 32), [wrong])
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.proj.weight)
    with pytest.raises(ExportError, match="differ from those of the model in 9 of 9 checks"):
        check_pair(other, *map(OnnxModel, pair_paths(path)), Budget())
    shutil.copy(pair_paths(path)[0], tmp_path / "other.tower.onnx")
    with pytest.raises(InputError, match="There is no file"):
        OnnxRetrieval(tmp_path / "other.onnx")
    head = onnx.load(pair_paths(path)[1])
    next(entry for entry in head.metadata_props if entry.key == "pair").value = "0"
    onnx.save(head, tmp_path / "other.head.onnx")
    with pytest.raises(InputError, match="belong to different models: export both again"):
        OnnxRetrieval(tmp_path / "other.onnx")


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    path = tmp_path / "nano.onnx"
    args = ["va_cca_minimal_vit_nano_patch4_32", "--output", str(path), "--static-size"]
    assert export(parser.parse_args(args)) == 0
    printed = capsys.readouterr().out
    assert printed.count("Wrote ") == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nano.head.onnx", "nano.tower.onnx"]
    code = printed.strip().splitlines()[-1].removeprefix("Next: python -c '").removesuffix("'")
    exec(code, {})
    assert capsys.readouterr().out.strip() == "(1, 1, 128)"
