"""A bundle of a toy: whole, verified, of use without PyTorch, in three languages; and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from tests.runtime import toys
from visionattn.cli import main
from visionattn.errors import ExportError, InputError
from visionattn.export import bundle as module
from visionattn.export.bundle import export_bundle
from visionattn_runtime import load, verify

VIT = "va_minimal_vit_micro_patch4_32"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    return export_bundle(toys.Labelled().eval(), folder)


def test_what_is_in_it(written):
    names = sorted(path.name for path in written.folder.iterdir())
    code = ["run.cpp", "run.mjs", "run.py", "sample", "visionattn_runtime"]
    assert names == ["LICENSE", "README.md", "card.json", "labels.txt", "model.onnx", *code]
    assert (written.folder / "labels.txt").read_text(encoding="utf-8") == "cat\ndög\nhen\n"
    assert "Apache License" in (written.folder / "LICENSE").read_text()
    assert sorted(path.name for path in (written.folder / "sample").iterdir()) == [
        "expected.npy",
        "input.png",
        "input.ppm",
    ]
    assert [path.name for path in written.folder.parent.iterdir()] == ["toy"]
    assert not any("__pycache__" in name for name in written.card["files"])
    assert [file.path for file in written.files] == [written.folder / "model.onnx"]


def test_the_card(written):
    card = json.loads((written.folder / "card.json").read_text(encoding="utf-8"))
    assert card == json.loads(json.dumps(written.card))
    assert (card["task"], card["weights"], card["labels"]) == ("classify", "as given", ["cat", "dög", "hen"])
    assert "NASA" in card["sample"]["source"]
    (variant,) = card["variants"]
    assert (variant["file"], variant["precision"], variant["quality"]) == ("model.onnx", "fp32", None)
    assert variant["bytes"] == (written.folder / "model.onnx").stat().st_size
    assert variant["error"] <= 1e-6
    assert variant["error"] < variant["allowed"] < 1e-3
    assert [cost["threads"] for cost in variant["cost"]] == [1, 2]
    assert all(cost["milliseconds"] > 0 for cost in variant["cost"])
    assert set(card["files"]) == {
        path.relative_to(written.folder).as_posix()
        for path in written.folder.rglob("*")
        if path.is_file() and path.name != "card.json"
    }
    readme = (written.folder / "README.md").read_text(encoding="utf-8")
    assert f"| `model.onnx` | fp32 | {variant['bytes'] / 1000:,.0f} | " in readme
    assert "python run.py model.onnx sample/input.png" in readme
    assert os.fspath(written.folder) not in readme + json.dumps(card)


def test_the_expected_result_is_pytorchs(written):
    model = load(written.folder / "model.onnx")
    pixels = np.asarray(Image.open(written.folder / "sample" / "input.png"))
    logits = model.features(pixels)
    with torch.no_grad():
        expected = toys.Labelled()(torch.from_numpy(model._array([_fitted(pixels)], "image")))
    np.testing.assert_allclose(np.load(written.folder / "sample" / "expected.npy"), expected.softmax(1), atol=1e-6)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def _fitted(pixels):
    from timm.data import create_transform

    transform = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.8, normalize=False, mean=0, std=1)
    return np.asarray(transform(Image.fromarray(pixels))).transpose(1, 2, 0)


def test_it_verifies(written):
    assert all(row.passed for row in written.rows)
    assert len(written.rows) == len(written.card["files"]) + 2
    assert verify(written.folder) == written.rows


def test_the_runner_works_elsewhere_without_pytorch(written, tmp_path):
    shutil.copytree(written.folder, tmp_path / "elsewhere")
    code = "\n".join(
        [
            "import runpy, sys",
            "for name in ('torch', 'timm', 'visionattn', 'onnx'): sys.modules[name] = None",
            "sys.argv = ['run.py', *sys.argv[1:]]",
            "runpy.run_path('run.py', run_name='__main__')",
        ]
    )
    # Isolated, so that the checkout's own runner is not found.
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"]
    for words, told in (
        (["--verify"], f"{len(written.rows)} of {len(written.rows)} checks passed"),
        (["model.onnx", "sample/input.png", "--top", "1"], r"sample/input\.png: (cat|dög|hen) \d"),
    ):
        found = subprocess.run([*command, *words], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert re.search(told, found.stdout)
    (tmp_path / "elsewhere" / "LICENSE").write_text("mine")
    found = subprocess.run([*command, "--verify"], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert found.returncode == 1
    assert "FAIL  LICENSE has changed" in found.stdout


def test_existing_folders(written, tmp_path):
    toy = toys.Labelled().eval()
    with pytest.raises(InputError, match=r"toy exists\. Give --overwrite"):
        export_bundle(toy, written.folder)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        export_bundle(toy, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_what_fails(tmp_path, monkeypatch):
    def write(model, path, **settings):
        toys.write(model, path)
        raise ExportError("no")

    monkeypatch.setattr(module, "export", write)
    with pytest.raises(ExportError):
        export_bundle(toys.Labelled().eval(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, told in (
        (f"export {VIT} --bundle a --output b.onnx", "not allowed with argument"),
        (f"export {VIT}", "one of the arguments --output --bundle is required"),
        (f"export {VIT} --bundle a --no-check", "leave out --format, --no-check and"),
        ("export va_minimal_vit_nano_patch7_28 --bundle a", "va_minimal_vit_nano_patch7_28"),
    ):
        assert main(line.split()) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_shipped_model_by_command(tmp_path, capsys):
    assert main(["export", VIT, "--bundle", str(tmp_path / "vit"), "--fp16"]) == 0
    assert "Next: python" in capsys.readouterr().out
    card = json.loads((tmp_path / "vit" / "card.json").read_text())
    assert [variant["precision"] for variant in card["variants"]] == ["fp32", "fp16"]
    assert card["variants"][1]["quality"]["loss"] < 2e-4
    assert "CIFAR-10" in (tmp_path / "vit" / "weights.md").read_text()
    assert visionattn.export_bundle is export_bundle
    assert all(row.passed for row in verify(tmp_path / "vit"))


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_sample_in_javascript_prepares_images_as_the_runner(written):
    script = """
import { readFileSync } from "node:fs";
import { prepare, readPpm, readSpec, softmax, toPixels } from "./run.mjs";
const ort = { Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } } };
const spec = readSpec(JSON.parse(readFileSync("card.json", "utf8")), "model.onnx");
const image = readPpm(readFileSync("small.ppm"));
const tensor = prepare(ort, image, spec);
const bytes = prepare(ort, image, { ...spec, input_type: "uint8" });
const pixels = toPixels({ data: Float32Array.from([-1, 0.5, 0.25, 2, 1, 0]), dims: [1, 3, 1, 2] }, { });
console.log(JSON.stringify({ values: [...tensor.data], dims: tensor.dims, bytes: [...bytes.data], shape: bytes.dims,
  soft: softmax([1, 2, 3]), pixels: [...pixels.data], height: pixels.height, width: pixels.width }));
"""
    photo = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(photo).save(written.folder / "small.ppm")
    command = ["node", "--input-type=module", "--eval", script]
    found = subprocess.run(command, cwd=written.folder, capture_output=True, text=True)
    (written.folder / "small.ppm").unlink()
    assert found.returncode == 0, found.stderr
    made = json.loads(found.stdout)
    expected = load(written.folder / "model.onnx")._array([photo], "image")
    assert made["dims"] == list(expected.shape)
    np.testing.assert_allclose(np.reshape(made["values"], expected.shape), expected, atol=1e-6)
    np.testing.assert_array_equal(np.reshape(made["bytes"], made["shape"]), photo[None])
    np.testing.assert_allclose(made["soft"], torch.tensor([1.0, 2, 3]).softmax(0), atol=1e-6)
    assert (made["pixels"], made["height"], made["width"]) == ([0, 64, 255, 128, 255, 0], 1, 2)
