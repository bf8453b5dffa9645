"""Metadata that is damaged, senseless or cannot be written costs a note and never the picture."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.predict.upscalers import picture
from visionattn.predict.images import picture as files
from visionattn.predict.images.metadata import exif_of, resolution
from visionattn.predict.images.picture import Picture, read, write
from visionattn.predict.images.png import chunk

Fraction = TiffImagePlugin.IFDRational
TEXTS = [
    (b"gAMA", struct.pack(">I", 100000)),
    (b"cHRM", struct.pack(">8I", *range(1, 9))),
    (b"cICP", bytes([9, 16, 0, 1])),
    (b"tEXt", b"Title\0Hello"),
    (b"iTXt", b"Author\0\0\0\0\0Me"),
    (b"zTXt", b"Long\0\0" + zlib.compress(b"x" * 50)),
]
XMP = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>")


def png(path, samples, bits, kind, chunks=()):
    """A PNG file made by hand: samples (H, W, C) of any depth and colour type."""
    rows = b""
    for row in samples:
        if bits < 8:
            row = np.packbits(np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)[:, 8 - bits :].ravel())
        rows += b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes()
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_becomes_alpha(tmp_path, bits, channels):
    if channels == 3 and bits < 8:
        pytest.skip("PNG knows no such RGB")
    samples = np.random.default_rng(0).integers(0, 2, (6, 8, channels)) * (2**bits - 1)
    key = samples[0, 0]
    path = png(tmp_path / "a.png", samples, bits, channels - 1, [(b"tRNS", key.astype(">u2").tobytes())])
    found = read(path).pixels
    assert found.dtype == (np.uint16 if bits == 16 else np.uint8)
    top = np.iinfo(found.dtype).max
    np.testing.assert_array_equal(found[..., :-1], samples * (top // (2**bits - 1)))
    np.testing.assert_array_equal(found[..., -1], np.where((samples == key).all(2), 0, top))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_text_and_colour_space_are_kept_in_png(tmp_path, bits, channels):
    samples = np.random.default_rng(0).integers(0, 2**bits, (6, 8, channels))
    path = png(tmp_path / "a.png", samples, bits, {1: 0, 3: 2, 4: 6}[channels], [*TEXTS, XMP])
    found = read(path)
    assert found.notes == ["left out: XMP"]
    write(tmp_path / "b.png", found)
    assert sorted(read(tmp_path / "b.png").chunks) == sorted(TEXTS)
    with Image.open(tmp_path / "b.png") as image:
        assert (image.info["gamma"], image.info["Title"], image.info["Author"]) == (1, "Hello", "Me")


def test_png_text_and_colour_space_are_said_to_be_lost_elsewhere(tmp_path):
    found = read(png(tmp_path / "a.png", np.zeros((6, 8, 3)), 8, 2, TEXTS))
    write(tmp_path / "b.jpg", found)
    assert found.notes == [
        "JPEG files keep no PNG text, so that it was left out",
        "its colour space (gAMA, cHRM, cICP), which only PNG can store, was left out",
    ]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("dots", [(0, 0), (1, 0), (4294967295, 1)])
def test_senseless_resolutions_cost_a_note(tmp_path, suffix, dots):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282] = tags[283] = Fraction(*dots)
    tags[296] = 2
    Image.fromarray(picture()).save(tmp_path / "a.tif", tiffinfo=tags)
    found = read(tmp_path / "a.tif")
    write(tmp_path / f"b{suffix}", found)
    assert found.notes == [
        "its resolution is not a number above 0 and up to 65535 dots per inch, so that it was left out",
    ]
    if suffix != ".webp":  # lossy in colours below
        assert read(tmp_path / f"b{suffix}").pixels.shape == (20, 30, 3)


def test_pixels_that_are_not_square_are_said_to_be_lost():
    note = "its pixels are not square, which was left out"
    for info in ({"aspect": (2, 1)}, {"resolution": (100, 50)}, {"jfif_unit": 0, "jfif_density": (4, 3)}):
        assert resolution(info) == (None, [note])
    for info in ({}, {"jfif_unit": 0, "jfif_density": (1, 1)}, {"dpi": (0, 0)}):
        assert resolution(info) == (None, [])
    assert resolution({"dpi": (300, 150)}) == ((300, 150), [])


def test_exif_that_cannot_be_written_again_is_left_out_tag_by_tag():
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0110] = object()
    exif.get_ifd(0x8769).update({0x9003: "2024:05:06 07:08:09", 0x829A: object()})
    found, notes = exif_of(lambda: exif)
    assert notes == ["2 of its EXIF tags, which cannot be written again, were left out"]
    assert found[0x010F] == "Maker"
    assert dict(found.get_ifd(0x8769)) == {0x9003: "2024:05:06 07:08:09"}
    found.tobytes()


def test_exif_that_cannot_be_read_is_left_out():
    def fail():
        raise SyntaxError("broken")

    assert exif_of(fail) == (None, ["its EXIF tags are damaged, so that they were left out"])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_what_a_writer_refuses_costs_a_note(tmp_path, suffix, monkeypatch):
    save = Image.Image.save

    def refuse(image, path, form, **options):
        if "exif" in options:
            raise RuntimeError("Error setting from dictionary")
        save(image, path, form, **options)

    monkeypatch.setattr(Image.Image, "save", refuse)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    found = Picture(picture(), exif=exif, dpi=(300, 300))
    write(tmp_path / f"a{suffix}", found)
    form = files.WRITABLE[suffix]
    assert found.notes == [f"its EXIF cannot be written into {form}, so that it was left out"]
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.size == (30, 20)


def test_exif_too_long_for_jpeg(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = b"x" * 70000
    exif[0x8769] = exif.get_ifd(0x8769)
    found = Picture(picture(), exif=exif)
    write(tmp_path / "a.jpg", found)
    assert found.notes == ["its EXIF cannot be written into JPEG, so that it was left out"]


@pytest.mark.parametrize(("name", "kind"), [("a.gif", "frames"), ("a.png", "frames"), ("a.webp", "frames")])
def test_animations_are_named(tmp_path, name, kind):
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (0, 1))
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    found = read(tmp_path / name)
    assert found.notes == [f"only the first of its 2 {kind} was used"]
    assert found.pixels.shape[:2] == (20, 30)


def test_further_images_of_a_telephone_are_named(tmp_path):
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert read(tmp_path / "a.jpg").notes == ["only the first of its 2 images was used"]


def test_xmp_iptc_and_comments_are_said_to_be_lost(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg", xmp=b"<x/>", comment="hello")
    assert read(tmp_path / "a.jpg").notes == ["left out: XMP, its comment"]
