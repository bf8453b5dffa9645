"""What a file says is kept: pixels of 8 and 16 bits, profile, EXIF, resolution; what is not is said."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from tests.predict.upscalers import picture
from visionattn.errors import DataError, InputError, StorageError
from visionattn.predict.images.picture import Picture, check_size, read, size_of, write

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation=1):
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    tags[0x0112] = orientation
    tags.get_ifd(0x8769).update({0xA002: 30, 0xA003: 20, 0x9003: "2024:05:06 07:08:09"})
    tags.get_ifd(0x8825).update({1: "N", 3: "E"})
    for ifd in (0x8769, 0x8825):  # as PIL's TIFF writer wants it
        tags[ifd] = tags.get_ifd(ifd)
    return tags


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_8_bits_there_and_back(tmp_path, suffix, channels):
    pixels = picture(20, 30, channels)
    write(tmp_path / f"a{suffix}", Picture(pixels))
    found = read(tmp_path / f"a{suffix}").pixels
    assert found.dtype == np.uint8
    if suffix == ".webp":  # lossy, and colour only
        assert found.shape[2] == (3 if channels in (1, 3) else 4)
    else:
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_there_and_back(tmp_path, suffix, channels):
    pixels = picture(20, 30, channels, np.uint16)
    write(tmp_path / f"a{suffix}", Picture(pixels, PROFILE, dpi=(300.0, 300.0)))
    found = read(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.icc == PROFILE
    assert found.dpi == pytest.approx((300, 300), abs=0.01)
    # An independent reader sees the same.
    other = cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED).reshape(20, 30, channels)
    np.testing.assert_array_equal(other, pixels[:, :, {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_of_grey_with_alpha(tmp_path, suffix):
    pixels = picture(20, 30, 2, np.uint16)
    write(tmp_path / f"a{suffix}", Picture(pixels))
    np.testing.assert_array_equal(read(tmp_path / f"a{suffix}").pixels, pixels[:, :, [0, 0, 0, 1]])


def test_a_16_bit_png_of_grey_with_alpha_is_read(tmp_path):
    """Neither PIL nor OpenCV writes such a file: a hand-made one of 2 x 1 pixels."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"\0" + struct.pack(">4H", 1000, 65535, 50001, 7)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 4, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert read(tmp_path / "a.png").pixels.tolist() == [[[1000, 1000, 1000, 65535], [50001, 50001, 50001, 7]]]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_16_bit_tiff_of_others(tmp_path, compression):
    pixels = picture(20, 30, 3, np.uint16)
    if compression == "tiff_lzw":
        flags = [cv2.IMWRITE_TIFF_COMPRESSION, 5]
        cv2.imwrite(str(tmp_path / "a.tif"), np.ascontiguousarray(pixels[:, :, ::-1]), flags)
    else:
        zipped = "zlib" if compression == "tiff_deflate" else None
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression=zipped, byteorder=">")
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_orientation_is_applied_and_reset(tmp_path, orientation, suffix):
    image = Image.fromarray(picture())
    image.save(tmp_path / f"a{suffix}", exif=exif(orientation))
    found = read(tmp_path / f"a{suffix}")
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(found.pixels, np.asarray(upright))
    assert found.exif[0x0112] == 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_of_16_bits(tmp_path, orientation):
    pixels = picture(20, 30, 3, np.uint16)
    write(tmp_path / "a.png", Picture(pixels, exif=exif(orientation)))
    expected = pixels if orientation == 1 else np.rot90(pixels, -1)
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, expected)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".tif"])
def test_profile_exif_and_resolution_are_kept(tmp_path, source, suffix):
    image = Image.fromarray(picture())
    image.save(tmp_path / f"in{source}", exif=exif(), icc_profile=PROFILE, dpi=(240, 240))
    found = read(tmp_path / f"in{source}")
    found.pixels = picture(40, 60)
    write(tmp_path / f"a{suffix}", found)
    assert found.notes == []
    with Image.open(tmp_path / f"a{suffix}") as result:
        assert result.size == (60, 40)
        assert result.info["icc_profile"] == PROFILE
        if suffix != ".webp":  # has no field for it
            assert result.info["dpi"] == pytest.approx((240, 240), abs=0.01)
        tags = result.getexif()
        assert (tags[0x010F], tags[0x0112]) == ("Maker", 1)
        details = tags.get_ifd(0x8769)
        assert details[0x9003] == "2024:05:06 07:08:09"
        assert (details[0xA002], details[0xA003]) == (60, 40)  # the new size
        assert tags.get_ifd(0x8825)[1] == "N"


def test_exif_of_16_bits_is_kept_in_png_and_said_to_be_lost_in_tiff(tmp_path):
    pixels = picture(dtype=np.uint16)
    write(tmp_path / "a.png", Picture(pixels, exif=exif()))
    assert read(tmp_path / "a.png").exif[0x010F] == "Maker"
    lost = Picture(pixels, exif=exif())
    write(tmp_path / "a.tif", lost)
    assert lost.notes == [
        "the EXIF tags were left out: 16-bit colour TIFF keeps the ICC profile and the resolution",
    ]


def test_palette_and_transparency(tmp_path):
    colours = Image.fromarray(picture()).quantize(8)
    colours.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, np.asarray(colours.convert("RGB")))
    colours.save(tmp_path / "b.png", transparency=0)
    found = read(tmp_path / "b.png").pixels
    assert found.shape == (20, 30, 4)
    np.testing.assert_array_equal(found[:, :, 3] == 0, np.asarray(colours) == 0)
    Image.fromarray(picture(channels=1)[:, :, 0]).save(tmp_path / "c.png", transparency=0)
    assert read(tmp_path / "c.png").pixels.shape == (20, 30, 2)


def test_what_a_format_cannot_hold_is_said(tmp_path):
    deep = Picture(picture(4, 4, 4, np.uint16))
    deep.pixels[:] = [65535, 0, 257, 0]
    write(tmp_path / "a.jpg", deep)
    assert deep.notes == [
        "JPEG stores 8 bits, so that 16 bits were reduced",
        "JPEG has no alpha, so that the image was composited on white",
    ]
    assert (read(tmp_path / "a.jpg").pixels == 255).all()


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=PROFILE)
    found = read(tmp_path / "a.jpg")
    assert (found.pixels.shape, found.icc) == ((20, 30, 3), None)
    assert "CMYK colours became RGB" in found.notes[0]


def test_pages_are_said(tmp_path):
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    found = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(found.pixels, np.asarray(first))
    assert found.notes == ["only the first of its 2 pages was used"]


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    whole = io.BytesIO()
    Image.fromarray(picture(200, 300)).save(whole, "JPEG" if kind == "truncated" else "PNG")
    data = whole.getvalue()
    contents = {
        "empty": b"",
        "text": b"I am not an image.\n",
        "truncated": data[: len(data) // 2],
        "corrupt": data[:100] + b"\xff" * 50 + data[150:],
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not an image: it is empty"),
        ("text", "is not an image: it is none of PNG, JPEG"),
        ("truncated", "Could not read the image .*truncated"),
        ("corrupt", "Could not read the image"),
    ],
)
def test_broken_files(tmp_path, kind, message):
    with pytest.raises(DataError, match=message):
        read(broken(tmp_path, kind))


def test_other_files_that_are_not_taken(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.png")
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float.tif: Its pixels have 32 bits"):
        read(tmp_path / "float.tif")


def test_size_of_the_header(tmp_path):
    write(tmp_path / "a.png", Picture(picture(20, 30)))
    assert size_of(tmp_path / "a.png") == (20, 30)


def test_sizes_that_a_format_cannot_state(tmp_path):
    with pytest.raises(InputError, match="WEBP supports at most 16383 per side"):
        check_size(tmp_path / "a.webp", 100, 16384)
    check_size(tmp_path / "a.png", 100, 70000)
    with pytest.raises(InputError, match="JPEG supports at most 65535"):
        write(tmp_path / "a.jpg", Picture(np.zeros((1, 65536, 1), np.uint8)))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "a.png", Picture(picture()))
    assert list(tmp_path.iterdir()) == []
