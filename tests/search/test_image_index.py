"""Searching an index: exactness, mixes, what is left out, and wrong input."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from tests.retrieval_toys import ToyConditional, picture, toy, write_pictures
from visionattn.data.retrieval.embedding import embed, eval_transform, input_config
from visionattn.errors import DataError, InputError, UnknownNameError
from visionattn.search.image_index import ImageIndex, build_index, find_images, read_upright


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures")


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
    for weights in ({"colour": 3.0}, {"kind": 1.0}, {"colour": 1.0, "kind": 0.5}, {"colour": 1e308, "kind": 1e308}):
        columns = [index.conditions.index(name) for name in weights]
        cosines = np.einsum("ce,nce->nc", query, vectors.numpy())[:, columns]
        shares = np.array(list(weights.values())) / max(weights.values())
        mixed = cosines @ (shares / shares.sum())
        hits = index.search(query, weights, 5)
        assert [hit.image for hit in hits] == [index.images[place] for place in np.argsort(-mixed)[:5]]
        assert [hit.score for hit in hits] == pytest.approx(sorted(mixed)[::-1][:5], abs=1e-5)
        assert hits[0].image == index.images[4]
        assert hits[0].cosines == pytest.approx(dict.fromkeys(weights, 1.0), abs=1e-5)
        others = index.search(query, weights, 4, exclude=[4])
        assert [hit.image for hit in others] == [hit.image for hit in hits[1:]]
    for top in (18, 100, 10**30):
        assert len(index.search(query, {"kind": 1.0}, top)) == 18
        assert len(index.search(query, {"kind": 1.0}, top, exclude=range(18))) == 0


@pytest.mark.parametrize("first_version", [False, True])
def test_copies_of_the_query(folder, tmp_path, first_version):
    shutil.copy(folder / "03_green_bars.png", folder / "copy.png")
    shutil.copy(folder / "03_green_bars.png", tmp_path / "query.png")
    build_index(folder, tmp_path / "index", toy(), "toy")
    index = ImageIndex(tmp_path / "index")
    if first_version:
        del index.manifest["digests"]
    expected = [index.images.index("03_green_bars.png"), index.images.index("copy.png")]
    for path in (folder / "copy.png", tmp_path / "query.png"):
        assert index.copies_of(path) == expected
    picture("red", "disc", 99).save(folder / "copy.png")
    assert expected[1] in index.copies_of(folder / "copy.png")  # the same file, whatever is in it now
    picture("red", "disc", 98).save(tmp_path / "query.png")
    assert index.copies_of(tmp_path / "query.png") == []


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


def test_wrong_input(folder, tmp_path):
    build_index(folder, tmp_path / "index", toy(), "toy")
    index = ImageIndex(tmp_path / "index")
    vectors = np.zeros((2, 8), np.float32)
    with pytest.raises(UnknownNameError, match=r"no attribute cut\. It has colour, kind"):
        index.search(vectors, {"cut": 1.0}, 3)
    for weights in ({"colour": 0.0}, {}, {"colour": np.nan}, {"colour": np.inf}, {"colour": 1.0, "kind": -1.0}):
        with pytest.raises(InputError, match="weights that are finite and above 0"):
            index.search(vectors, weights, 3)
    for top in (0, -1):
        with pytest.raises(InputError, match=f"must be at least 1; got {top}"):
            index.search(vectors, {"colour": 1.0}, top)
    for wrong in (np.full((2, 8), np.nan, np.float32), vectors[:1], vectors[:, :4]):
        with pytest.raises(InputError, match=r"The query must have the shape \(2, 8\) and finite values"):
            index.search(wrong, {"colour": 1.0}, 3)
    with pytest.raises(DataError, match="is damaged: a score is not a cosine"):
        index.search(np.full((2, 8), 100, np.float32), {"colour": 1.0, "kind": 1.0}, 3)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere", "pictures/00_red_bars.png", "a\0b"):
        with pytest.raises(DataError, match="holds no index"):
            ImageIndex(tmp_path / name)
    for entry in ("size", "mean", "std", "interpolation"):
        for value in (None, [0, 0], "much", [1e999] * 3):
            index.manifest["input"] = input_config(toy()) | {entry: value}
            with pytest.raises(InputError, match=r"Images cannot be prepared by|image size must be"):
                index.embed(toy(), picture("red", "disc"))


def test_files_are_searched_as_they_were_when_they_were_opened(folder, tmp_path):
    build_index(folder, tmp_path / "index", toy(), "toy")
    index = ImageIndex(tmp_path / "index")
    query = index.embed(toy(), picture("red", "disc"))
    (folder / "00_red_bars.png").unlink()
    build_index(folder, tmp_path / "index", toy(), "toy")
    with pytest.raises(DataError, match="17 images, the manifest 18"):
        index.search(query, {"colour": 1.0}, 3)
