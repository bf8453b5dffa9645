"""The commands index and search: their output, their notes, and what they refuse."""

from __future__ import annotations

import json
import os
import re

import pytest
from PIL import Image

pytest.importorskip("faiss")

from tests.retrieval_toys import picture, plain, toy, write_pictures
from visionattn import cli
from visionattn.errors import CheckpointError, InputError, UnknownNameError
from visionattn.search import api, sheet
from visionattn.search.image_index import Hit
from visionattn.search.sheet import contact_sheet


@pytest.fixture
def commands(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with pictures; gives its exit code, output and error output."""
    write_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "_open", lambda name, *_: toy(int(name == "other")))

    def run(*words):
        code = cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, " ".join(shown.err.split())

    return run


@pytest.fixture
def indexed(commands):
    assert commands("index", "pictures", "index", "--model", "toy")[0] == 0
    return commands


QUERY = "pictures/00_red_bars.png"
SEARCH = ("search", "index", QUERY, "--attribute", "colour")


def found_names(path):
    with open(path) as file:
        return [hit["image"] for hit in json.load(file)["hits"]]


def found():
    with open("search.json") as file:
        return json.load(file)


def test_index_says_what_it_did(commands, tmp_path):
    (tmp_path / "pictures/bad.png").write_bytes(b"no image")
    code, out, err = commands("index", "pictures", "index", "--model", "toy")
    assert code == 1
    assert "index: 18 images, searchable by colour, kind" in out
    assert "18 added, 0 refreshed, 0 removed" in out
    assert "bad.png" in err
    assert "1 images could not be read and are not in the index." in err
    (tmp_path / "pictures/bad.png").unlink()
    picture("red", "disc", 50).save(tmp_path / "pictures/new.png")
    code, out, err = commands("index", "pictures", "index", "--model", "toy")
    assert (code, err) == (0, "")
    assert "1 added, 0 refreshed, 0 removed" in out


def test_index_says_what_it_left_out(commands, tmp_path):
    for name in ("a.heic", "note.txt", ".hidden.png"):
        (tmp_path / "pictures" / name).touch()
    code, _, err = commands("index", "pictures", "index", "--model", "toy")
    assert code == 0
    assert err.endswith("left out 1 hidden (.hidden.png), 1 with suffix .heic (a.heic), 1 with suffix .txt (note.txt).")


def test_search_leaves_out_the_query(indexed):
    code, _, err = indexed(*SEARCH[:-1], "colour=1,kind=0.5", "--top", 7)
    assert code == 0
    assert "the query itself is in the index (00_red_bars.png) and left out; --include-query finds it too" in err
    first = found()
    assert first["attributes"] == {"colour": 1.0, "kind": 0.5}
    assert first["left_out"] == ["00_red_bars.png"]
    assert len(first["hits"]) == 7
    mixed = [(hit["cosines"]["colour"] + 0.5 * hit["cosines"]["kind"]) / 1.5 for hit in first["hits"]]
    assert [hit["score"] for hit in first["hits"]] == pytest.approx(mixed)
    with Image.open("search.png") as drawn:
        assert drawn.size == (6 * 188 + 8, 2 * 216 + 8)
    code, _, err = indexed(*SEARCH[:-1], "colour=1,kind=0.5", "--top", 8, "--include-query", "--overwrite")
    assert (code, err) == (0, "")
    names = [hit["image"] for hit in found()["hits"]]
    assert names == ["00_red_bars.png", *(hit["image"] for hit in first["hits"])]


def test_an_absurd_number_of_hits_ends_with_all_images(indexed, monkeypatch):
    monkeypatch.setattr(sheet, "SHOWN", 5)
    code, _, err = indexed(*SEARCH, "--top", 10**9)
    assert code == 0
    assert len(found()["hits"]) == 17
    assert "the contact sheet shows the first 5 of 17 images" in err
    with Image.open("search.png") as drawn:
        assert drawn.size == (6 * 188 + 8, 216 + 8)


def test_a_moved_folder_and_changed_images_are_noticed(indexed, tmp_path):
    (tmp_path / "pictures").rename(tmp_path / "moved")
    search = ("search", "index", "moved/00_red_bars.png", "--attribute", "colour", "--overwrite")
    code, _, err = indexed(*search)
    assert code == 0
    assert f"the image folder {tmp_path}/pictures no longer exists: give its new path with --images FOLDER" in err
    code, _, err = indexed(*search, "--images", "moved")
    assert "gone" not in err
    with Image.open("search.png") as drawn:
        assert drawn.getpixel((8 + 188 + 90, 8 + 90)) != (128, 128, 128)
    for hit in found()["hits"][:2]:
        (tmp_path / "moved" / hit["image"]).unlink()
    picture("red", "disc", 60).save(tmp_path / "moved" / found()["hits"][2]["image"])
    code, _, err = indexed(*search, "--images", "moved")
    assert code == 0
    assert "2 of the images found are no longer in moved: run visionattn index again" in err
    assert "1 of the images found have changed since they were indexed" in err
    assert indexed("index", "moved", "index", "--model", "toy")[:1] == (0,)
    assert "note: the query" in indexed(*search)[2]


def test_names_that_are_markup_or_no_utf_8(commands, tmp_path):
    odd = [os.fsencode("[/red]\n.png"), b"\xff[bold.png"]
    (tmp_path / "pictures/[").mkdir()
    for name in odd:
        picture("red", "disc", len(name)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / "pictures" / os.fsdecode(name))
    assert commands("index", "pictures", "[/in]dex", "--model", "toy")[0] == 0
    search = ("search", "[/in]dex", QUERY, "--attribute", "colour,kind", "--top", 100, "--output", "[/o]ut.png")
    code, out, _ = commands(*search)
    assert code == 0
    assert "[/red] .png" in out
    assert r"\udcff[bold.png" in out
    assert "wrote [/o]ut.png and [/o]ut.json" in out
    with open("[/o]ut.json") as file:
        names = {os.fsencode(hit["image"]) for hit in json.load(file)["hits"]}
    assert set(odd) <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attribute", "cut"], "It has colour, kind"),
        (["--attribute", "colour=much"], "'much' is not a number"),
        (["--attribute", "colour=nan"], "'nan' is not finite"),
        (["--attribute", "colour=-1"], "finite and above 0"),
        (["--attribute", "colour=1,colour=2"], "'colour' is given twice"),
        (["--attribute", "colour", "--output", "found.gif"], "the file name must end in .png or"),
        (["--attribute", "colour", "--output", "b.png", "--model", "other"], "Give the model that made it"),
        (["--attribute", "colour", "--output", QUERY, "--overwrite"], "would replace the query image"),
        (["--attribute", "colour", "--output", "n" * 300 + ".png"], "File name too long"),
        (["--attribute", "colour", "--output", "pictures/00_red_bars.png/a.png"], "Not a directory"),
    ],
)
def test_what_search_refuses(indexed, words, message):
    code, _, err = indexed("search", "index", QUERY, *words)
    assert code == 2
    assert message in err
    assert err.startswith("visionattn: ")


@pytest.mark.parametrize("words", [["--top", "0"], ["--top", "-1"], ["--top", "1.5"]])
def test_numbers_of_hits_that_are_none(indexed, words):
    code, _, err = indexed(*SEARCH, *words)
    assert code == 2
    assert "--top: must be a whole number of at least 1" in err


def test_outputs_stay(indexed, tmp_path):
    assert indexed(*SEARCH)[0] == 0
    before = (tmp_path / "search.json").read_bytes()
    assert "search.png exists. Give --overwrite" in indexed(*SEARCH)[2]
    (tmp_path / "search.png").unlink()
    assert "search.json exists. Give --overwrite" in indexed(*SEARCH)[2]
    assert (tmp_path / "search.json").read_bytes() == before
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in indexed(*SEARCH, "--output", "pipe.png", "--overwrite")[2]
    assert "not a regular file" in indexed("search", "index", "pipe.png", "--attribute", "colour", "--overwrite")[2]


@pytest.mark.parametrize("size", [("0", "0"), ("-1", "24"), ("24", "10000000000")])
def test_impossible_sizes_are_refused(commands, size):
    code, _, err = commands("index", "pictures", "index", "--model", "toy", "--image-size", *size)
    assert code == 2
    assert "--image-size: must be a whole number from 1 to 8192" in err


def test_an_index_of_the_first_version_made_at_another_size(indexed, tmp_path):
    path = tmp_path / "index/manifest.json"
    old = json.loads(path.read_text())
    for entry in ("checksum", "checksums", "digests"):
        del old[entry]
    old["input"]["size"] = [48, 48]
    path.write_text(json.dumps(old))
    code, _, err = indexed(*SEARCH)
    assert code == 0
    assert "the images were indexed at [48, 48] pixels, but the model's input size is [24, 24]: index them again" in err


def test_command_takes_names_and_weight_files():
    with pytest.raises(CheckpointError, match=r"There is no file other\.safetensors"):
        api._open("other.safetensors", "cpu")
    with pytest.raises(UnknownNameError, match="There is no model 'va_ca'"):
        api._open("va_ca", "cpu")
    for name in ("va_span_ch26_x2", "va_match_stereo_nano"):
        with pytest.raises(InputError, match=f"{name} cannot be used here: it is a '(restore|stereo)' model"):
            api._open(name, "cpu")


def test_an_index_of_one_attribute_needs_none(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "_open", lambda *_: plain())
    assert commands("index", "pictures", "index", "--model", "plain")[0] == 0
    code, out, _ = commands("search", "index", QUERY, "--output", "found.html")
    assert code == 0
    assert "wrote found.html and found.json" in out
    page = (tmp_path / "found.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img") == 13  # the query and 12 hits
    assert "<script" not in page
    assert "http" not in page
    assert "12 images of" in page
    assert "by image." in page
    assert found_names("found.json") == re.findall(r"<span>([^<]*\.png)</span>", page)


def test_several_attributes_must_be_chosen_from(indexed):
    code, _, err = indexed("search", "index", QUERY)
    assert code == 2
    assert "index has the attributes colour, kind: choose with --attribute" in err


def test_a_page_names_what_cannot_be_read_and_escapes(tmp_path):
    page = sheet.page("A <b>", ["<p>"], {"G & H": [sheet.Cell("<i>gone.png", "0.5")]}, tmp_path)
    assert "<h1>A &lt;b&gt;</h1>" in page
    assert "<h2>G &amp; H</h2>" in page
    assert "cannot be read" in page
    assert "&lt;i&gt;gone.png" in page
    assert "<img" not in page


def test_contact_sheet_of_images_that_are_gone_or_of_extreme_aspect(tmp_path):
    Image.new("RGB", (40_000, 1), "red").save(tmp_path / "wide.png")
    hits = [Hit("gone.png", 0.5, {"colour": 0.5}), Hit("wide.png", 0.5, {"colour": 0.5})]
    drawn = contact_sheet(picture("red", "disc"), hits, tmp_path)
    assert drawn.getpixel((8 + 188 + 90, 8 + 90)) == (128, 128, 128)
    assert drawn.getpixel((8 + 2 * 188 + 90, 8 + 89)) == (255, 0, 0)
