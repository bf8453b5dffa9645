"""Near-duplicates: against a comparison of every pair, with copies, chains and what is refused."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")

import visionattn
from tests.retrieval_toys import plain, toy, write_pictures
from visionattn import cli
from visionattn.errors import DataError, InputError, UnknownNameError
from visionattn.search import duplicates
from visionattn.search.building import write_index
from visionattn.search.image_index import ImageIndex


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made(folder, vectors, **entries):
    """An index of given vectors (N, E)."""
    names = [f"{number}.png" for number in range(len(vectors))]
    manifest = {"model": "toy", "weights": "", "input": {}, "conditions": ["image"], "folder": str(folder)}
    write_index(folder, unit(vectors).astype(np.float32)[:, None], {**manifest, "images": names, **entries})
    return ImageIndex(folder)


@pytest.fixture
def clustered(tmp_path):
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(40, 16))
    return made(tmp_path / "index", centres[generator.integers(0, 40, 300)] + 0.2 * generator.normal(size=(300, 16)))


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_every_pair_is_found(clustered, monkeypatch, block, threshold):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    vectors = duplicates.read_vectors(clustered.folder, clustered.manifest, 0).astype(np.float64)
    expected = {
        (i, j): vectors[i] @ vectors[j]
        for i, j in itertools.combinations(range(300), 2)
        if vectors[i] @ vectors[j] >= threshold
    }
    found = visionattn.duplicates(clustered, threshold=threshold, device="cpu")
    got = {(int(pair.first[:-4]), int(pair.second[:-4])): pair.cosine for pair in found.pairs}
    assert got.keys() == expected.keys()
    assert len(got) > 3
    np.testing.assert_allclose([got[key] for key in expected], list(expected.values()), atol=1e-6)
    assert [pair.cosine for pair in found.pairs] == sorted(got.values(), reverse=True)


def test_chains_make_one_group(tmp_path):
    angles = np.radians([0, 10, 20, 90, 95, 200])
    found = visionattn.duplicates(
        made(tmp_path / "index", np.stack([np.cos(angles), np.sin(angles)], 1)), threshold=0.98
    )
    assert found.groups == [["0.png", "1.png", "2.png"], ["3.png", "4.png"]]
    assert repr(found) == "Duplicates(2 groups, 3 of 6 images beyond the first of each)"


def test_equal_files_are_one_image_whatever_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 10)
    vectors = np.random.default_rng(0).normal(size=(200, 16))
    vectors[:100] = vectors[0]
    found = visionattn.duplicates(made(tmp_path / "a", vectors, digests=["0"] * 100 + [None] * 100), threshold=1)
    assert len(found.groups) == 1
    assert len(found.groups[0]) == 100
    assert all(pair.same and pair.first == "0.png" and pair.cosine == pytest.approx(1) for pair in found.pairs)
    with pytest.raises(InputError, match="More than 10 pairs have a cosine of 1: raise the threshold"):
        visionattn.duplicates(made(tmp_path / "b", vectors), threshold=1)


def test_what_is_refused(clustered, tmp_path):
    for threshold in (0, -1, 1.01, float("nan")):
        with pytest.raises(InputError, match="threshold must be above 0 and at most 1"):
            visionattn.duplicates(clustered, threshold=threshold)
    with pytest.raises(UnknownNameError, match="It has image"):
        visionattn.duplicates(clustered, "colour")
    with pytest.raises(InputError, match=r"must end in \.html or \.json"):
        visionattn.duplicates(clustered, output=tmp_path / "a.png")
    path = clustered.folder / "00.faiss"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        visionattn.duplicates(clustered)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    shutil.copy("pictures/00_red_bars.png", "pictures/<copy>.png")
    visionattn.index("pictures", "index", plain(), device="cpu", progress=False)
    return tmp_path


def test_the_command_writes_a_page_and_its_numbers(folder, capsys):
    assert cli.main(["duplicates", "index", "--threshold", "0.9999"]) == 0
    out = capsys.readouterr().out
    assert "<copy>.png" in out
    assert "wrote duplicates.html and duplicates.json" in out
    numbers = json.loads(Path("duplicates.json").read_text())
    assert ["00_red_bars.png", "<copy>.png"] in numbers["groups"]
    assert numbers["pairs"][0][3] is True
    page = Path("duplicates.html").read_text()
    assert "&lt;copy&gt;.png" in page
    assert "1.0000, equal files" in page
    assert "<script" not in page
    assert page.count("<img") == sum(map(len, numbers["groups"]))
    assert cli.main(["duplicates", "index"]) == 2
    assert "duplicates.html exists. Give --overwrite" in capsys.readouterr().err
    Path("duplicates.html").unlink()
    assert cli.main(["duplicates", "index", "--output", "only.json"]) == 0
    assert not Path("duplicates.html").exists()
    assert Path("only.json").exists()


def test_of_several_attributes_one_is_named(folder):
    index = visionattn.index("pictures", "other", toy(), device="cpu", progress=False)
    with pytest.raises(InputError, match="has the attributes colour, kind: choose with --attribute"):
        visionattn.duplicates(index)
    assert visionattn.duplicates(index, "colour", threshold=0.9).attribute == "colour"


def test_defaults_are_those_of_the_command():
    (parser,) = [a for a in cli._parser("duplicates")._actions if a.dest == "command"]
    options = {action.dest: action.default for action in parser.choices["duplicates"]._actions if action.dest != "help"}
    signature = inspect.signature(visionattn.duplicates).parameters
    assert options.keys() == signature.keys()
    assert all(options[name] == signature[name].default for name in options.keys() - {"index", "output"})


def test_what_is_usual_is_said(clustered):
    vectors = duplicates.read_vectors(clustered.folder, clustered.manifest, 0)
    cosines = (vectors @ vectors.T)[np.triu_indices(300, 1)]
    found = visionattn.duplicates(clustered)
    assert found.usual == pytest.approx(np.percentile(cosines, [50, 99.9]), abs=1e-6)
    assert f"usually have a cosine of {found.usual[0]:.3f} (median)" in found.to_html()


def test_a_threshold_is_named_where_most_images_are_taken_for_copies(tmp_path, capsys, monkeypatch):
    generator = np.random.default_rng(2)
    vectors = np.ones(16) + 0.1 * generator.normal(size=(40, 16))  # all alike: cosines of about 0.98
    index = made(tmp_path / "index", vectors)
    found = visionattn.duplicates(index)
    assert [len(group) for group in found.groups] == [40]
    higher = found.higher_threshold()
    assert f"Most images count as copies: use --threshold {higher:g}." in found.to_html()
    assert max(len(group) for group in visionattn.duplicates(index, threshold=higher).groups) <= 4
    assert max(len(group) for group in visionattn.duplicates(index, threshold=higher - 1e-4).groups) > 4
    monkeypatch.chdir(tmp_path)
    assert cli.main(["duplicates", "index"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cosine of at least 0.95: 1 group, 39 of 40 images beyond the first of each" in out
    assert f"use --threshold {higher:g}." in out


def test_no_threshold_splits_equal_files_or_equal_vectors(tmp_path, clustered):
    equal = np.ones((10, 4))
    assert visionattn.duplicates(made(tmp_path / "one", equal)).higher_threshold() is None
    assert visionattn.duplicates(made(tmp_path / "two", equal, digests=["a"] * 10)).higher_threshold() is None
    assert visionattn.duplicates(clustered, threshold=0.99).higher_threshold() is None
