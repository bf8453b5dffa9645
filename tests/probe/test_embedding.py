"""Vectors of images as a file: those of the backbone, with names and labels where folders tell them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from tests.probe.runs import NAME, pictures
from tests.probe.stores import vit
from visionattn.cli import main
from visionattn.errors import InputError
from visionattn.probe import Backbone

QUICK = {"random": True, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def found(images, tmp_path_factory):
    file = tmp_path_factory.mktemp("vectors") / "out.npz"
    assert main(["probe", NAME, "--random", "--data", str(images), "--embed", str(file), "--device", "cpu"]) == 0
    with np.load(file) as content:  # no pickles
        return {name: content[name] for name in content.files}


def test_a_folder_with_classes(found, images):
    names = found["names"].tolist()
    assert len(names) == 24
    assert names == sorted(names)
    assert found["classes"].tolist() == ["none", "one"]
    assert [found["classes"][label] for label in found["labels"]] == [name.split("/")[1] for name in names]
    assert all((images / name).is_file() for name in names)
    assert (found["features"].shape, found["features"].dtype) == ((24, 64), np.float32)
    facts = json.loads(str(found["facts"]))
    assert facts["backbone"]["name"] == NAME
    assert facts["backbone"]["weights"] == "random"
    assert facts["preprocessing"]["image_size"] == 28
    assert facts["features"] == "class token"


def test_they_are_what_the_backbone_gives(found, images):
    vectors = visionattn.embed(NAME, images, **QUICK)
    assert np.array_equal(vectors.features, found["features"])
    assert repr(vectors) == "Embeddings(24 images, 64 values each, 2 classes)"
    net = vit(img_size=28, patch_size=7)
    pixels = [np.array(Image.open(images / name).convert("RGB")) for name in found["names"][:3]]
    given = visionattn.embed(net, pixels, image_size=28, device="cpu", progress=False)
    mean, std = (torch.tensor(given.facts["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
    batch = torch.stack([(torch.from_numpy(image).movedim(-1, 0) / 255 - mean) / std for image in pixels])
    (tokens,) = Backbone(net, image_size=28)(batch)
    torch.testing.assert_close(torch.from_numpy(given.features), tokens.class_token)
    torch.testing.assert_close(torch.from_numpy(given.patch_means), tokens.patches.mean(1))
    assert given.labels.tolist() == [-1, -1, -1]
    assert given.names == ["image 0", "image 1", "image 2"]


def test_images_without_labels(images, tmp_path):
    for number, file in enumerate(sorted((images / "test/one").iterdir())):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    vectors = visionattn.embed(NAME, tmp_path, **QUICK)
    assert vectors.labels.tolist() == [-1] * 4
    assert vectors.classes == ()
    one = visionattn.embed(NAME, tmp_path / "2.png", **QUICK)
    torch.testing.assert_close(one.features[0], vectors.features[2], rtol=1e-4, atol=1e-5)


def test_a_named_dataset_has_its_labels():
    vectors = visionattn.embed(NAME, "digits", **QUICK)
    assert vectors.features.shape == (1797, 64)
    assert sorted(set(vectors.labels.tolist())) == list(range(10))
    assert vectors.names[0].startswith("train/")
    assert sum(name.startswith("test/") for name in vectors.names) == 360


def test_files_are_kept_and_broken_images_listed(tmp_path, capsys):
    pictures(tmp_path / "data", {"train": {"one": 12}}, broken=["train/one/broken.png"])
    words = ["probe", NAME, "--random", "--data", str(tmp_path / "data"), "--embed", str(tmp_path / "out.npz")]
    assert main(words) == 1
    assert "left out: train/one/broken.png" in capsys.readouterr().err
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([NAME, "--random", "--data", "lost", "--embed", "out.npz"], "There is no file or folder lost"),
        ([NAME, "--random", "--data", ".", "--embed", "out.npz"], "There are no images in ."),
        ([NAME, "--random", "--data", ".", "--embed", "out.csv"], ".npz"),
        ([NAME, "--random", "--embed", "out.npz"], "required: --data"),
        ([NAME, NAME, "--random", "--data", ".", "--embed", "out.npz"], "--embed requires a single backbone; got 2"),
        ([NAME, "--random", "--data", "digits", "--layers", "1,2", "--embed", "out.npz"], "embed reads a single layer"),
    ],
)
def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_work(tmp_path):
    (tmp_path / "out.npz").write_bytes(b"")
    with pytest.raises(InputError, match="exists"):
        visionattn.embed("va_lost", tmp_path, tmp_path / "out.npz")
