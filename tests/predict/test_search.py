"""Indexing a folder and searching it: exactness, mixes, what a stopped run leaves, and wrong input."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("faiss")

from retrieval_toys import COLOURS, KINDS, ToyConditional, picture
from visionattn import cli
from visionattn.data.embedding import embed, eval_transform, input_config
from visionattn.errors import CheckpointError, DataError, InputError, UnknownNameError
from visionattn.predict import image_index, search_cli
from visionattn.predict.image_index import Hit, ImageIndex, build_index, find_images, read_upright


def toy(seed=0):
    torch.manual_seed(seed)
    return ToyConditional(("colour", "kind"), 8).eval()


@pytest.fixture
def folder(tmp_path):
    """Eighteen pictures, some in a sub-folder."""
    for number, (copy, colour, kind) in enumerate(itertools.product(range(2), COLOURS, KINDS)):
        path = tmp_path / f"pictures/{'more/' * copy}{number:02d}_{colour}_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colour, kind, number).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(image_index, "BLOCK", 5)
    monkeypatch.setattr(image_index, "BATCH", 2)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_search_is_exact(folder, tmp_path):
    model = toy()
    assert build_index(folder, tmp_path / "index", model, "toy") == []
    index = ImageIndex(tmp_path / "index")
    assert index.images == find_images(folder)
    transform = eval_transform(input_config(model))
    with torch.inference_mode():
        vectors = embed(model, torch.stack([transform(read_upright(folder / name)) for name in index.images]))
    query = index.embed(model, read_upright(folder / index.images[4]))
    np.testing.assert_allclose(query, vectors[4], atol=1e-6)
    for weights in ({"colour": 3.0}, {"kind": 1.0}, {"colour": 1.0, "kind": 0.5}):
        total = sum(weights.values())
        columns = [index.conditions.index(name) for name in weights]
        cosines = np.einsum("ce,nce->nc", query, vectors.numpy())[:, columns]
        mixed = cosines @ (np.array(list(weights.values())) / total)
        hits = index.search(query, weights, 5)
        assert [hit.image for hit in hits] == [index.images[place] for place in np.argsort(-mixed)[:5]]
        assert [hit.score for hit in hits] == pytest.approx(sorted(mixed)[::-1][:5], abs=1e-5)
        assert hits[0].image == index.images[4]
        assert hits[0].cosines == pytest.approx(dict.fromkeys(weights, 1.0), abs=1e-5)
    assert len(index.search(query, {"kind": 1.0}, 100)) == 18


def test_a_stopped_run_ends_with_the_same_bytes(folder, tmp_path, small_blocks, monkeypatch):
    (folder / "07_bad.png").write_bytes(b"no image")
    whole = build_index(folder, tmp_path / "whole", toy(), "toy")
    assert len(whole) == 1
    assert "07_bad.png" in whole[0]
    calls = []

    def stops(model, images):
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return embed(model, images)

    monkeypatch.setattr(image_index, "embed", stops)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(), "toy")
    with pytest.raises(DataError, match="is unfinished: run visionattn index again"):
        ImageIndex(tmp_path / "index")
    before = len(list((tmp_path / "index/parts").glob("*.npz")))
    assert before == 1
    calls.clear()
    monkeypatch.setattr(image_index, "embed", lambda model, images: calls.append(len(images)) or embed(model, images))
    assert build_index(folder, tmp_path / "index", toy(), "toy") == whole
    assert sum(calls) == 18 - 5
    assert files(tmp_path / "index") == files(tmp_path / "whole")
    # Nothing is done twice.
    calls.clear()
    assert build_index(folder, tmp_path / "index", toy(), "toy") == whole
    assert calls == []


def test_other_images_or_models_need_a_word(folder, tmp_path, small_blocks):
    build_index(folder, tmp_path / "index", toy(), "toy")
    (folder / "00_red_bars.png").unlink()
    with pytest.raises(InputError, match="of other images or of another model: give --overwrite"):
        build_index(folder, tmp_path / "index", toy(), "toy")
    build_index(folder, tmp_path / "index", toy(1), "toy", overwrite=True)
    index = ImageIndex(tmp_path / "index")
    assert len(index.images) == 17
    index.check(toy(1), "toy")
    with pytest.raises(CheckpointError, match=r"made by toy with the weights \w{12}; other has"):
        index.check(toy(), "other")


def test_unfinished_parts_of_another_model_are_not_taken(folder, tmp_path, small_blocks, monkeypatch):
    build_index(folder, tmp_path / "whole", toy(1), "toy")
    monkeypatch.setattr(image_index, "_gather", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(0), "toy")
    monkeypatch.undo()
    monkeypatch.setattr(image_index, "BLOCK", 5)
    monkeypatch.setattr(image_index, "BATCH", 2)
    build_index(folder, tmp_path / "index", toy(1), "toy")
    assert files(tmp_path / "index") == files(tmp_path / "whole")


def test_wrong_input(folder, tmp_path):
    build_index(folder, tmp_path / "index", toy(), "toy")
    index = ImageIndex(tmp_path / "index")
    vectors = np.zeros((2, 8), np.float32)
    with pytest.raises(UnknownNameError, match=r"no attribute cut\. It has colour, kind"):
        index.search(vectors, {"cut": 1.0}, 3)
    for weights in ({"colour": 0.0}, {}):
        with pytest.raises(InputError, match="weights are above 0"):
            index.search(vectors, weights, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There are no images in"):
        build_index(tmp_path / "empty", tmp_path / "other", toy(), "toy")
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="There is no folder"):
        build_index(tmp_path / "nowhere", tmp_path / "other", toy(), "toy")
    with pytest.raises(DataError, match="holds no index"):
        ImageIndex(tmp_path / "empty")
    (tmp_path / "empty/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 1 images .* it is empty"):
        build_index(tmp_path / "empty", tmp_path / "other", toy(), "toy")
    (tmp_path / "index/00.faiss").write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged"):
        index.search(vectors, {"colour": 1.0}, 3)
    shutil.copy(tmp_path / "index/01.faiss", tmp_path / "index/00.faiss")
    index.manifest["images"] = index.manifest["images"][:3]
    with pytest.raises(DataError, match="index them again"):
        ImageIndex.search(index, vectors, {"colour": 1.0}, 3)
    classifier = toy()
    classifier.attributes, classifier.num_classes = (), 10
    with pytest.raises(InputError, match="gives no embeddings"):
        build_index(folder, tmp_path / "third", classifier, "classifier")


def test_a_model_with_one_space(folder, tmp_path):
    class MeanColour(ToyConditional):
        def forward(self, x):
            return self.backbone.bias.sum() * 0 + x.mean(dim=(2, 3))

    model = MeanColour((), 8).eval()
    build_index(folder, tmp_path / "index", model, "mean colour")
    index = ImageIndex(tmp_path / "index")
    assert index.conditions == ("image",)
    hits = index.search(index.embed(model, picture("green", "disc", 99)), {"image": 1.0}, 6)
    assert all("green" in hit.image for hit in hits)


def test_pictures_are_read_upright_and_on_white(tmp_path):
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert np.unique(np.asarray(read_upright(tmp_path / "clear.png"))).tolist() == [255]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert (read_upright(tmp_path / "turned.jpg").size, read_upright(tmp_path / "turned.jpg").mode) == ((4, 6), "RGB")
    Image.fromarray(np.full((4, 6), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_upright(tmp_path / "deep.png")).max() == 255


def test_commands(folder, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(search_cli, "_open", lambda name: opened.append(name) or toy(int(name == "other")))
    monkeypatch.chdir(tmp_path)
    (folder / "bad.png").write_bytes(b"no image")
    assert cli.main(["index", "pictures", "index", "--model", "toy"]) == 1
    shown = capsys.readouterr()
    assert "18 images, to be searched by colour, kind" in shown.out
    assert "bad.png is not an image" in shown.err
    query = str(folder / "00_red_bars.png")
    assert cli.main(["search", "index", query, "--attribute", "colour=1,kind=0.5", "--top", "7"]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["attributes"] == {"colour": 1.0, "kind": 0.5}
    assert found["hits"][0]["image"] == "00_red_bars.png"
    assert len(found["hits"]) == 7
    mixed = [(hit["cosines"]["colour"] + 0.5 * hit["cosines"]["kind"]) / 1.5 for hit in found["hits"]]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx(mixed)
    with Image.open("search.png") as sheet:
        assert sheet.size == (6 * 188 + 8, 2 * 216 + 8)
    capsys.readouterr()
    for words, message in (
        (["--attribute", "colour"], "search.png exists: give --overwrite"),
        (["--attribute", "cut"], "It has colour, kind"),
        (["--attribute", "colour=much"], "'much' is no number"),
        (["--attribute", "colour=nan"], "'nan' is no weight"),
        (["--attribute", "colour", "--output", "found.gif"], "its suffix is none of"),
        (["--attribute", "colour", "--output", "a.png", "--top", "0"], "it is 1 or more"),
        (["--attribute", "colour", "--output", "b.png", "--model", "other"], "Give the model that made it"),
    ):
        assert cli.main(["search", "index", query, *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert opened[:2] == ["toy", "toy"]


def test_command_takes_names_and_weight_files():
    with pytest.raises(CheckpointError, match=r"There is no file other\.safetensors"):
        search_cli._open("other.safetensors")
    with pytest.raises(UnknownNameError, match="There is no model 'va_ca'"):
        search_cli._open("va_ca")


def test_contact_sheet_of_images_that_are_gone(tmp_path):
    sheet = search_cli.contact_sheet(picture("red", "disc"), [Hit("gone.png", 0.5, {"colour": 0.5})], tmp_path)
    assert sheet.getpixel((8 + 188 + 90, 8 + 90)) == (128, 128, 128)
