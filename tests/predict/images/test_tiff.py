"""TIFF layouts: colours are those that were written, whatever the order of planes, the meaning of 0 and the alpha."""

import struct

import numpy as np
import pytest
from PIL import Image

from tests.predict.upscalers import picture
from visionattn.errors import DataError, InputError
from visionattn.predict.images.picture import read, size_of, write

tifffile = pytest.importorskip("tifffile")
DTYPES = [np.uint8, np.uint16]


def save(path, pixels, separate=False, **options):
    """Write (H, W, S) as it is."""
    stored = np.moveaxis(pixels, -1, 0) if separate and pixels.shape[2] > 1 else pixels
    stored = stored[..., 0] if pixels.shape[2] == 1 else stored
    planes = {"planarconfig": "separate" if separate else "contig"} if pixels.shape[2] > 1 else {}
    tifffile.imwrite(path, stored, **planes, **options)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_planes_of_rgb(tmp_path, dtype, separate, compression, byteorder):
    pixels = picture(dtype=dtype)
    options = {"photometric": "rgb", "compression": compression, "byteorder": byteorder}
    path = save(tmp_path / "a.tif", pixels, separate, **options)
    np.testing.assert_array_equal(read(path).pixels, pixels)
    assert size_of(path) == (20, 30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_white_is_zero(tmp_path, dtype, byteorder, options):
    pixels = picture(channels=1, dtype=dtype)
    path = save(tmp_path / "a.tif", pixels, photometric="miniswhite", byteorder=byteorder, **options)
    np.testing.assert_array_equal(read(path).pixels, np.iinfo(dtype).max - pixels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("colours", [1, 3])
def test_alpha_is_kept(tmp_path, dtype, separate, colours):
    pixels = picture(channels=colours + 1, dtype=dtype)
    kind = "rgb" if colours == 3 else "minisblack"
    path = save(tmp_path / "a.tif", pixels, separate, photometric=kind, extrasamples=[2])
    np.testing.assert_array_equal(read(path).pixels, pixels)


@pytest.mark.parametrize("separate", [False, True])
def test_premultiplied_alpha_is_divided_out(tmp_path, separate):
    pixels = np.array([[[100, 200, 300, 600], [0, 0, 0, 0], [65535, 1, 2, 65535]]], np.uint16)
    path = save(tmp_path / "a.tif", pixels, separate, photometric="rgb", extrasamples=[1])
    expected = [[10922, 21845, 32768, 600], [0, 0, 0, 0], [65535, 1, 2, 65535]]
    assert np.abs(read(path).pixels[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("separate", [False, True])
def test_a_fourth_channel_that_is_not_alpha_is_left_out_with_a_note(tmp_path, separate):
    pixels = picture(channels=4, dtype=np.uint16)
    found = read(save(tmp_path / "a.tif", pixels, separate, photometric="rgb", extrasamples=[0]))
    np.testing.assert_array_equal(found.pixels, pixels[..., :3])
    assert found.notes == ["1 of its channels, which are not stated to be alpha, were left out"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
def test_cmyk(tmp_path, dtype, separate):
    pixels, top = picture(channels=4, dtype=dtype), np.iinfo(dtype).max
    path = save(tmp_path / "a.tif", pixels, separate, photometric="separated")
    expected = (1 - pixels[..., :3] / top) * (1 - pixels[..., 3:] / top) * top
    assert np.abs(read(path).pixels - expected).max() <= 0.6 if dtype == np.uint8 else 2


def test_palettes_of_8_and_16_bits(tmp_path):
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        colours = np.random.default_rng(0).integers(0, 256, (3, 2**bits)).astype(np.uint16) * 257
        index = picture(channels=1, dtype=dtype)[..., 0]
        tifffile.imwrite(tmp_path / "a.tif", index, photometric="palette", colormap=colours)
        expected = colours[:, index].transpose(1, 2, 0)
        np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, expected if bits == 16 else expected // 257)


def test_lab_is_what_an_independent_conversion_says(tmp_path):
    color = pytest.importorskip("skimage.color")
    stored = np.full((4, 5, 3), (136, 50, 226), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="cielab")
    expected = color.lab2rgb(np.array([[[136 / 2.55, 50, 226 - 256]]])) * 255
    assert np.abs(read(tmp_path / "a.tif").pixels - expected).max() < 4


def test_tiled_big_and_lzw_files(tmp_path):
    cv2 = pytest.importorskip("cv2")
    pixels = picture(40, 50, 3, np.uint16)
    for number, options in enumerate(
        ({"tile": (16, 16)}, {"bigtiff": True}, {"compression": "zlib", "predictor": True})
    ):
        path = save(tmp_path / f"{number}.tif", pixels, photometric="rgb", **options)
        np.testing.assert_array_equal(read(path).pixels, pixels)
    path = save(tmp_path / "separate.tif", pixels, True, photometric="rgb", tile=(16, 16))
    np.testing.assert_array_equal(read(path).pixels, pixels)
    cv2.imwrite(str(tmp_path / "lzw.tif"), pixels[..., ::-1].copy(), [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    np.testing.assert_array_equal(read(tmp_path / "lzw.tif").pixels, pixels)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5, 3), np.float16), "16 bits, signed or floats"),
        (np.zeros((4, 5, 3), np.float32), "32 bits, signed or floats"),
        (np.zeros((4, 5, 3), np.int16), "16 bits, signed or floats"),
        (np.zeros((4, 5, 3), np.uint32), "have 32 bits, whose range"),
    ],
)
def test_samples_of_unknown_range_are_refused(tmp_path, pixels, message):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.tif")


def renamed(path, tag):
    """The same file without a tag: its number becomes a private one."""
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<HHI", tag, 3, 1))
    data[place : place + 2] = struct.pack("<H", 60000)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_without_tag_262_the_usual_meaning_is_taken_and_said(tmp_path, dtype, channels):
    pixels = picture(channels=channels, dtype=dtype)
    kind = "rgb" if channels == 3 else "minisblack"
    found = read(renamed(save(tmp_path / "a.tif", pixels, photometric=kind), 262))
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.notes == ["it does not state its photometric interpretation (tag 262): assumed the default"]


def test_profile_resolution_and_exif_of_separate_planes(tmp_path):
    pixels = picture(dtype=np.uint16)
    tags = [(271, 2, 5, "Maker", True), (274, 3, 1, 6, True), (34675, 7, 7, b"profile", True)]
    options = {"resolution": (300, 300), "resolutionunit": 2, "extratags": tags, "metadata": None}
    path = save(tmp_path / "a.tif", pixels, True, photometric="rgb", **options)
    found = read(path)
    np.testing.assert_array_equal(found.pixels, np.rot90(pixels, -1))
    assert (found.icc, found.dpi, found.exif[0x010F], found.exif[0x0112]) == (b"profile", (300, 300), "Maker", 1)
    write(tmp_path / "b.png", found)
    np.testing.assert_array_equal(read(tmp_path / "b.png").pixels, np.rot90(pixels, -1))


@pytest.mark.parametrize("separate", [False, True])
def test_damaged_files_are_one_line(tmp_path, separate):
    path = save(tmp_path / "a.tif", picture(dtype=np.uint16), separate, photometric="rgb", compression="zlib")
    whole = path.read_bytes()
    for cut in (16, 40, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises((DataError, InputError)) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_white_is_zero_in_8_bits_by_pil_alone(tmp_path):
    path = save(tmp_path / "a.tif", picture(channels=1), photometric="miniswhite")
    np.testing.assert_array_equal(np.asarray(Image.open(path))[..., None], read(path).pixels)
