"""A bundle of an attribute-retrieval model: two files of one name, its sample, and both code samples' part in it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import visionattn
from tests.export.test_export_retrieval import build as build_retrieval
from tests.runtime import toys
from visionattn.errors import InputError
from visionattn.export import OnnxFile, OnnxModel
from visionattn.export import bundle as module
from visionattn.export.bundle import export_bundle
from visionattn.export.retrieval import pair_paths
from visionattn_runtime import load, verify


class Whole(torch.nn.Module):
    """Tower and head, in place of a model that takes seconds to export."""

    task, num_classes, attributes = "retrieve", 0, toys.Tower.attributes
    pretrained_cfg = toys.Tower.pretrained_cfg

    def __init__(self):
        super().__init__()
        self.forward_tokens, self.head = toys.Tower(), toys.Head()

    def forward(self, image):
        """(B, 3, H, W) -> (B, A, 3)."""
        return self.head(self.forward_tokens(image), torch.arange(len(self.attributes)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    def export(model, path, **settings):
        parts = zip(pair_paths(path), (model.forward_tokens, model.head))
        written = [toys.write(part.eval(), part_path) for part_path, part in parts]
        return tuple(OnnxFile(part, OnnxModel(part).spec, 1, 1, 0.0, []) for part in written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export", export)
        return export_bundle(Whole().eval(), tmp_path_factory.mktemp("bundles") / "clothes")


def test_both_files_verify_on_the_sample(written):
    assert {"model.tower.onnx", "model.head.onnx", "sample/input.png"} <= written.card["files"].keys()
    rows = verify(written.folder)
    assert len(rows) == len(written.card["files"]) + 2
    assert all(row.passed for row in rows)
    expected = np.load(written.folder / "sample" / "expected.npy")
    assert expected.shape == (1, 3, 3)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=2), 1, rtol=1e-5)
    found = load(written.folder / "model.onnx").embed(written.folder / "sample" / "input.png", attributes=["season"])
    np.testing.assert_allclose(found, expected[:, 2:], atol=1e-6)


def test_the_card_tells_of_both_files(written):
    (variant,) = written.card["variants"]
    sizes = [(written.folder / f"model.{part}.onnx").stat().st_size for part in ("tower", "head")]
    assert (variant["file"], variant["bytes"]) == ("model.onnx", sum(sizes))
    readme = (written.folder / "README.md").read_text(encoding="utf-8")
    assert "output: embeddings." in readme
    assert "`model.tower.onnx`, from an image to tokens, and `model.head.onnx`" in readme
    assert "Attributes: colour, kind, season." in readme
    assert "python run.py model.onnx sample/input.png --output result.npy" in readme


def test_a_changed_head_fails(written, tmp_path):
    shutil.copytree(written.folder, tmp_path / "changed")
    other = toys.Head().eval()
    other.table.data.neg_()
    toys.write(other, tmp_path / "changed" / "model.head.onnx")
    failed = [row for row in verify(tmp_path / "changed") if not row.passed]
    assert [row.file for row in failed] == ["model.head.onnx", "model.onnx"]
    assert "computes the sample to" in failed[1].finding


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_sample_in_javascript_names_attributes(written):
    script = """
import { readFileSync } from "node:fs";
import { embed, readSpec } from "./run.mjs";
const ort = { Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } } };
const spec = readSpec(JSON.parse(readFileSync("card.json", "utf8")), "model.onnx");
const head = { run: async (feeds) => ({ embeddings: feeds }) };
const show = ({ tokens, conditions }) => [tokens, conditions.type, [...conditions.data].map(Number), conditions.dims];
console.log(JSON.stringify([show(await embed(ort, head, spec, 7)), show(await embed(ort, head, spec, 7, ["season"]))]));
await embed(ort, head, spec, 7, ["size"]);
"""
    command = ["node", "--input-type=module", "--eval", script]
    found = subprocess.run(command, cwd=written.folder, capture_output=True, text=True)
    assert json.loads(found.stdout) == [[7, "int64", [0, 1, 2], [3]], [7, "int64", [2], [1]]]
    assert "There is no attribute size: use colour, kind, season." in found.stderr


def test_the_sample_in_cpp_feeds_the_inputs_of_the_head(written):
    """It is not compiled here: its names are those of the file."""
    code = (written.folder / "run.cpp").read_text(encoding="utf-8")
    head = load(written.folder / "model.onnx").head
    assert re.findall(r'BindInput\("(\w+)"', code) == head.spec["input_names"]
    assert re.findall(r'BindOutput\("(\w+)"', code) == head.spec["output_names"]


def test_what_has_no_sample_is_refused_before_the_export(tmp_path, monkeypatch):
    class Other(toys.Labelled):
        task = "caption"

    monkeypatch.setattr(module, "export", None)
    with pytest.raises(InputError, match=r"tasks 'classify', .* 'retrieve', .* Write a file with --output instead"):
        visionattn.export_bundle(Other().eval(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_model(tmp_path):
    bundle = export_bundle(build_retrieval(), tmp_path / "clothes", static_size=True)
    assert [file.path.name for file in bundle.files] == ["model.tower.onnx", "model.head.onnx"]
    assert all(row.passed for row in bundle.rows)
