"""`visionattn.index` and `visionattn.search` as functions: kinds of input, and what the commands do with them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("faiss")

import visionattn
from tests.retrieval_toys import plain, toy, write_pictures
from visionattn import cli
from visionattn.errors import CheckpointError, InputError, UnknownNameError
from visionattn.search import api

QUERY = "pictures/00_red_bars.png"


@pytest.fixture
def index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    return visionattn.index("pictures", "index", toy(), device="cpu", progress=False)


def test_an_index_says_what_it_holds_and_what_changed(index):
    assert repr(index) == "ImageIndex('index': 18 images, attributes colour, kind)"
    assert str(index.update) == "18 added, 0 refreshed, 0 removed"
    assert index.update.failures == []
    again = visionattn.index("pictures", "index", toy(), image_size=24, progress=False)
    assert str(again.update) == "0 added, 0 refreshed, 0 removed"


def test_queries_are_files_images_or_arrays(index):
    image = Image.open(QUERY)
    every = [
        visionattn.search(index, query, "colour", include_query=True)
        for query in (QUERY, Path(QUERY), image, np.asarray(image), np.asarray(image).astype(np.uint16) * 257)
    ]
    assert every[0][0].image == "00_red_bars.png"
    assert every[0][0].score == pytest.approx(1, abs=1e-5)
    assert all(hits == every[0] for hits in every)
    with pytest.raises(InputError, match=r"got \(3, 24, 24, 1\) of uint8"):
        visionattn.search(index, np.zeros((3, 24, 24, 1), np.uint8), "colour")
    with pytest.raises(InputError, match="a file, a PIL image or an array; got int"):
        visionattn.search(index, 3, "colour")


def test_a_query_image_is_turned_upright(index, tmp_path):
    image = Image.open(QUERY)
    turned = image.rotate(90, expand=True)
    turned.getexif()[274] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    upright = visionattn.search(index, "turned.png", "colour")
    with Image.open("turned.png") as opened:
        assert visionattn.search(index, opened, "colour") == upright


def test_attributes_are_one_several_or_weighted(index):
    image = Image.open(QUERY)
    mixed = visionattn.search(index, image, ["colour", "kind"])
    assert mixed == visionattn.search(index, image, {"colour": 2, "kind": 2})
    assert mixed[0].score == pytest.approx(sum(mixed[0].cosines.values()) / 2)
    assert repr(mixed[0]) == "Hit('00_red_bars.png', 1.000: colour 1.000, kind 1.000)"
    with pytest.raises(UnknownNameError, match="It has colour, kind"):
        visionattn.search(index, image, "cut")


def test_a_file_is_left_out_and_its_name_is_said(index):
    hits = visionattn.search(index, QUERY, "colour", top=3)
    assert len(hits) == 3
    assert hits.left_out == ["00_red_bars.png"]
    assert "the query itself is in the index" in hits.notes[0]
    assert hits.contact_sheet().size == (4 * 188 + 8, 216 + 8)
    assert hits._repr_png_().startswith(b"\x89PNG")
    assert not Path("search.png").exists()


def test_the_function_does_what_the_command_does(index, monkeypatch, capsys):
    monkeypatch.setattr(api, "_open", lambda *_: toy())
    own = visionattn.search("index", QUERY, {"colour": 1.0, "kind": 0.5}, top=5, output="own.png")
    assert cli.main(["search", "index", QUERY, "--attribute", "colour=1,kind=0.5", "--top", "5"]) == 0
    for suffix in ("png", "json"):
        assert Path(f"own.{suffix}").read_bytes() == Path(f"search.{suffix}").read_bytes()
    assert [hit["image"] for hit in json.loads(Path("own.json").read_text())["hits"]] == [hit.image for hit in own]
    with pytest.raises(InputError, match=r"own\.png exists"):
        visionattn.search("index", QUERY, "colour", output="own.png")
    assert cli.main(["index", "pictures", "other", "--model", "toy"]) == 0
    for name in ("00.faiss", "01.faiss"):
        assert Path("other", name).read_bytes() == Path("index", name).read_bytes()


def test_any_model_of_timms_by_name_file_or_module(index, tmp_path):
    name, size = "va_minimal_vit_nano_patch4_32", 32
    module = timm.create_model(name, num_classes=10).eval()
    torch.save(module.state_dict(), "weights.pth")
    with pytest.raises(CheckpointError):
        visionattn.index("pictures", "named", name, progress=False)
    made = visionattn.index(
        "pictures", "named", name, checkpoint="weights.pth", image_size=size, device="cpu", progress=False
    )
    assert made.conditions == ("image",)
    hits = visionattn.search("named", QUERY, include_query=True)  # opens the name and its file again
    assert hits[0].image == "00_red_bars.png"
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    given = visionattn.index("pictures", "given", module, device="cpu", progress=False)
    assert module.num_classes == 10
    assert visionattn.search(given, QUERY) == visionattn.search("named", QUERY)


@pytest.mark.parametrize("name", ["index", "search"])
def test_defaults_are_those_of_the_command(name):
    (parser,) = [a for a in cli._parser(name)._actions if a.dest == "command"]
    options = {action.dest: action for action in parser.choices[name]._actions if action.dest != "help"}
    signature = inspect.signature(getattr(api, name)).parameters
    differing = {"index": set(), "search": {"output"}}[name]  # the function writes nothing unasked
    renamed = {"attribute": "attributes"}
    for dest, action in options.items():
        parameter = signature[renamed.get(dest, dest)]
        if parameter.default is not inspect.Parameter.empty and dest not in differing:
            assert parameter.default == action.default, dest
    assert {renamed.get(dest, dest) for dest in options} == set(signature) - {"progress"}


def test_the_index_has_a_default_name_and_the_model_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    with pytest.raises(InputError, match="model is missing"):
        visionattn.index("pictures")
    visionattn.index("pictures", model=plain(), device="cpu", progress=False)
    assert visionattn.search("index", QUERY, model=plain()).folder == (tmp_path / "pictures")
