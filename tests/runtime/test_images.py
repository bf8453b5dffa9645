"""Images as arrays, files and PIL images; resized and cropped as timm does; tiles."""

import re

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from visionattn_runtime import RunError
from visionattn_runtime.images import cut, fit_image, pad, read_image, unit


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("shape", [(36, 50), (50, 36), (20, 20), (9, 70)])
def test_fitting_is_timms(mode, size, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    mean, pct = (0.5, 0.4, 0.3), 0.8
    spec = {"input_size": [3, *size], "crop_pct": pct, "crop_mode": mode, "interpolation": "bicubic", "mean": mean}
    options = {"input_size": (3, *size), "crop_pct": pct, "crop_mode": mode, "interpolation": "bicubic", "mean": mean}
    expected = create_transform(**options, std=(1, 1, 1), normalize=False)(Image.fromarray(pixels))
    np.testing.assert_array_equal(fit_image(pixels, spec), np.asarray(expected).transpose(1, 2, 0))


def test_fitting_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 1), np.uint8)
    spec = {"input_size": [1, 8, 12], "crop_pct": None, "crop_mode": None, "interpolation": None, "mean": None}
    np.testing.assert_array_equal(fit_image(pixels, spec), pixels)


def test_every_kind_of_image_gives_the_same_pixels(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for image in (photo, tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(photo)):
        np.testing.assert_array_equal(read_image(image), photo)
    np.testing.assert_allclose(unit(read_image(photo / 255)), unit(photo), atol=1e-7)
    np.testing.assert_allclose(unit(photo.astype(np.uint16) * 257), unit(photo), atol=1e-7)


def test_channels(photo):
    grey = photo[..., 0]
    np.testing.assert_array_equal(read_image(grey), np.repeat(grey[..., None], 3, 2))
    assert read_image(grey, 1).shape == (36, 50, 1)
    expected = np.asarray(Image.fromarray(photo).convert("L"))
    assert np.abs(read_image(photo, 1)[..., 0].astype(int) - expected).max() <= 1
    half = np.dstack([photo, np.full((36, 50), 51, np.uint8)])
    np.testing.assert_array_equal(read_image(half), np.rint(photo * np.float32(0.2) + 204).astype(np.uint8))


def test_photographs_are_turned_upright(tmp_path, photo):
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(photo, 3))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "LA", "I;16"])
def test_modes_of_pil(mode, photo):
    image = Image.fromarray(photo).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    expected = np.asarray(image.convert("RGB")) / 255 if mode != "I;16" else np.asarray(image)[..., None] / 65535
    assert np.abs(unit(read_image(image)) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.full((4, 4, 3), 255.0), r"floats from 255 to 255; floats must be in 0\.\.1: divide by"),
        (np.full((4, 4, 3), -0.1), r"floats from -0\.1"),
        (np.full((4, 4, 3), np.nan), r"NaN or infinite"),
        (np.full((4, 4, 3), np.inf), r"NaN or infinite"),
        (np.zeros((4, 4, 3), np.int64), r"of uint8, uint16 or floats in 0\.\.1; got int64"),
        (np.zeros((4, 4, 3), bool), r"got bool"),
        (np.zeros((1, 3, 4, 4)), r"got the shape \(1, 3, 4, 4\)"),
        (np.zeros((3, 40, 40)), r"got the shape \(3, 40, 40\)"),
        (np.zeros((0, 4, 3)), r"got the shape \(0, 4, 3\)"),
        (None, r"must be a path, a PIL image or an array; got a NoneType"),
        ([[1, 2]], r"got a list"),
        ("absent.png", r"There is no file absent\.png"),
        ("n\0ul.png", r"n ul\.png"),
        (Image.new("F", (4, 4)), r"32 bits per channel"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image, told):
    with pytest.raises(RunError, match=told) as raised:
        read_image(image)
    assert "\n" not in str(raised.value)


def test_damaged_files(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(RunError, match=f"Cannot read the image .*{re.escape(name)}: "):
            read_image(tmp_path / name)


def test_channels_that_a_file_does_not_take():
    with pytest.raises(RunError, match="has 3 channels; this file requires 5"):
        read_image(np.zeros((4, 4, 3), np.uint8), 5)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 29, 100])
def test_tiles_keep_every_pixel_once_and_reach_beyond_it(length, fixed):
    window, overlap = 16, 3
    tiles = cut(length, window, overlap, fixed)
    kept = [index for _, part in tiles for index in range(part.start, part.stop)]
    assert kept == list(range(length))
    for read, part in tiles:
        assert read.start <= max(part.start - overlap, 0)
        assert read.stop >= min(part.stop + overlap, length)
        assert read.start >= 0
        assert read.stop <= length
        assert read.stop - read.start <= window
        assert not fixed or length < window or read.stop - read.start == window


def test_tiles_that_are_all_overlap():
    with pytest.raises(RunError, match=r"Tiles of 16 pixels must be larger than their overlap of 16: export"):
        cut(100, 16, 8, True)


def test_padding_repeats_the_border():
    padded = pad(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 3, 5)[..., 0]
    np.testing.assert_array_equal(padded, [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5]])
