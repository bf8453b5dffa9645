"""Files that commit 10ca68a wrote still open, and still give what they gave there (`old_files/expected.json`).

Made there, from images of `retrieval_toys.picture`: a classifier of two epochs and a retrieval model of one by
`visionattn fit`, and from these the outputs of `visionattn export`, `index` and `probe`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tests.retrieval_toys  # noqa: F401  registers toy_conditional
import visionattn
from tests.retrieval_toys import COLOURS, picture
from visionattn.cli import main
from visionattn.export import run
from visionattn.probe import load_head
from visionattn.probe.tokens.features import StoredFeatures
from visionattn.search.image_index import ImageIndex

OLD = Path(__file__).parent / "old_files"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def check(output, name):
    np.testing.assert_allclose(np.asarray(output), np.array(EXPECTED[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("classify", 32), ("retrieve", 24)])
def test_checkpoints(name, size):
    with torch.no_grad():
        check(visionattn.load(OLD / f"{name}.ckpt").eval()(noise(2, 3, size, size)), name)


def test_onnx_file():
    check(run(OLD / "classify.onnx", noise(2, 3, 32, 32).numpy())[0], "onnx")


def test_probe_head():
    head = load_head(next((OLD / "heads").glob("*.safetensors"))).eval()
    with torch.no_grad():
        check(head(noise(2, 65, 8)), "head")


def test_feature_store():
    store = StoredFeatures(OLD / "store")
    assert store.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert store.classes == ("blue", "green", "red")
    _, (tokens,) = next(iter(store.batches(torch.arange(6), 6)))
    images = torch.stack(
        [
            torch.from_numpy(np.array(picture(colour, "bars", seed, 32))).permute(2, 0, 1) / 255
            for colour in sorted(COLOURS)
            for seed in range(2)
        ]
    )
    model = visionattn.load(OLD / "classify.ckpt").eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((images - mean) / std)[:, 1:]
    torch.testing.assert_close(tokens.patches.float(), expected, rtol=2e-3, atol=2e-3)  # stored in float16


def test_index():
    model = visionattn.load(OLD / "retrieve.ckpt").eval()
    index = ImageIndex(OLD / "index")
    index.check(model, "retrieve.ckpt")
    query = index.embed(model, Image.open(OLD / "query.png"))
    assert [hit.image for hit in index.search(query, {"colour": 1.0}, 5)] == EXPECTED["found"]


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    for split, count in (("train", 4), ("val", 2)):
        for colour in COLOURS:
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for seed in range(count):
                picture(colour, "bars", seed, 32).save(folder / f"{seed}.png")
    shutil.copy(OLD / "classify.ckpt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_goes_on(run_folder):
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
    data = ["--config", "minimal_vit_folder", "--data.root=images", "--data.image_size=32", "--data.batch_size=4"]
    model = ["--model.name=va_minimal_vit_nano_patch4_32", "--model.model_args={embed_dim: 8, depth: 1, num_heads: 1}"]
    assert main(["fit", *data, *model, *options, "--ckpt_path=classify.ckpt", "--trainer.max_epochs=3"]) == 0
    last = torch.load(next(run_folder.rglob("last.ckpt")), weights_only=True)
    assert (last["epoch"], last["global_step"]) == (2, 9)
