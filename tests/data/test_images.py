"""Image files: one list of endings, what is left out is named, and whatever lies in a file, one line comes of it."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data.images import (
    SUFFIXES,
    check_unreadable,
    class_folders,
    eight_bits,
    find_images,
    list_images,
    open_image,
    pair_by_name,
    read_rgb,
)
from visionattn.errors import DataError

WRITERS = {".jfif": "JPEG", ".pgm": "PPM"}


def save(path, size=(8, 6), colour=(200, 60, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format=WRITERS.get(path.suffix.lower()))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_ending_is_found_and_read_in_any_case(tmp_path, suffix):
    files = [save(tmp_path / f"a{suffix}"), save(tmp_path / f"B{suffix.upper()}")]
    assert sorted(find_images(tmp_path)) == sorted(files)
    for file in files:
        pixels = read_rgb(file)
        assert pixels.shape == (6, 8, 3)
        assert np.abs(pixels.astype(int) - (200, 60, 20)).max() <= 12


def test_what_is_left_out_is_named(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".git" / "b.png")
    save(tmp_path / "__MACOSX" / "c.png")
    save(tmp_path / "sub" / "d.png")
    (tmp_path / "e.heic").write_bytes(b"")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    flat = list_images(tmp_path)
    assert [path.name for path in flat.files] == ["a.png"]
    assert {reason: sorted(path.name for path in paths) for reason, paths in flat.left_out.items()} == {
        "hidden": [".git", ".hidden.png", "Thumbs.db", "__MACOSX"],
        "in sub-folders": ["sub"],
        "with suffix .heic": ["e.heic"],
        "not a regular file": ["pipe.png"],
    }
    assert "1 with suffix .heic (e.heic)" in flat.describe_left_out()
    deep = list_images(tmp_path, recursive=True)
    assert [path.name for path in deep.files] == ["a.png", "d.png"]


def test_a_loop_of_links_ends(tmp_path):
    save(tmp_path / "sub" / "a.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [path.name for path in list_images(tmp_path, recursive=True).files] == ["a.png"]


def test_class_folders_are_those_that_a_user_made(tmp_path):
    for name in ("night", "day", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "note.txt").write_text("")
    assert list(class_folders(tmp_path)) == ["day", "night"]


def test_a_folder_without_images_says_what_lies_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images .* Left out: 1 with suffix \.heic"):
        find_images(tmp_path)
    for place in (tmp_path / "absent", tmp_path / "a.heic", "n" * 300, "n\0ul"):
        with pytest.raises(DataError, match=r"There is no folder|Cannot read the folder"):
            find_images(place)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "eps"])
def test_a_damaged_file_costs_one_line(tmp_path, damage):
    path = save(tmp_path / "a.png", size=(64, 64))
    content = {"empty": b"", "cut": path.read_bytes()[:60], "text": b"hello", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
    path.write_bytes(content[damage])
    with pytest.raises(DataError, match=r"Could not read the image .*a\.png: [^\n]+\.$"):
        open_image(path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="not a regular file"):
        open_image(tmp_path / "a.png")


def test_the_size_is_checked_before_decoding(tmp_path):
    path = save(tmp_path / "a.png", size=(100, 100))
    with pytest.raises(DataError, match=r"100 x 100 pixels exceed the limit of 9,999"):
        open_image(path, max_pixels=9_999)


def test_deep_images_are_refused_as_8_bit(tmp_path):
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        read_rgb(tmp_path / "deep.png")


def test_pairs_by_name(tmp_path):
    high = [save(tmp_path / "high" / name) for name in ("a.png", "b.png")]
    low = [save(tmp_path / "low" / name) for name in ("a.png", "bx2.png")]
    assert pair_by_name(high, tmp_path / "low", 2) == low
    low[1].unlink()
    with pytest.raises(DataError, match=r"has no low-resolution images for b\.png"):
        pair_by_name(high, tmp_path / "low", 2)


def test_an_image_is_read_from_a_stream(tmp_path):
    path = save(tmp_path / "a.png")
    assert open_image("a.png", stream=io.BytesIO(path.read_bytes())).tobytes() == open_image(path).tobytes()
    with pytest.raises(DataError, match=r"Could not read the image a\.png of b\.zip"):
        open_image("a.png of b.zip", stream=io.BytesIO(b"no image"))


def test_grey_of_16_bits_is_scaled_and_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(eight_bits(open_image(tmp_path / "a.png"), "a.png")).tolist() == [[0, 100, 255]]
    with pytest.raises(DataError, match="32 bits per channel"):
        eight_bits(Image.new("F", (2, 2)), "a.tif")
    colour = Image.new("RGB", (2, 2))
    assert eight_bits(colour, "a.png") is colour


@pytest.mark.parametrize(("bad", "count", "refused"), [(5, 10, False), (6, 59, True), (10, 100, False), (2, 2, True)])
def test_too_many_unreadable_images_are_an_error(bad, count, refused):
    if not refused:
        check_unreadable(["a.png"] * bad, count)
        return
    with pytest.raises(DataError, match=r"of the \d+ images can(not)? be read\. The first: a\.png"):
        check_unreadable(["a.png"] * bad, count)


def test_a_sub_folder_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    entries = Path.iterdir

    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return entries(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    listing = list_images(tmp_path, recursive=True)
    assert listing.files == [tmp_path / "a.png"]
    assert listing.left_out == {"unreadable": [tmp_path / "closed"]}
