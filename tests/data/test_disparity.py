"""Disparity and flow there and back, NaN where there is no value; the bytes are those of the formats' definitions."""

import re
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from visionattn.data.disparity import (
    DISPARITY_FILES,
    FLOW_FILES,
    read_disparity,
    read_flow,
    write_disparity,
    write_flow,
)
from visionattn.errors import DataError, InputError, MissingPackageError


@pytest.fixture
def disparity():
    values = np.random.default_rng(0).integers(0, 65000, (5, 7)).astype(np.float32) / 256
    values[1, 2] = np.nan
    values[4, 6] = 0
    return values


@pytest.fixture
def flow():
    values = np.random.default_rng(0).integers(-30000, 30000, (5, 7, 2)).astype(np.float32) / 64
    values[1, 2] = np.nan
    return values


@pytest.mark.parametrize("suffix", DISPARITY_FILES)
def test_disparity_there_and_back(tmp_path, disparity, suffix):
    write_disparity(tmp_path / f"a{suffix}", disparity)
    found = read_disparity(tmp_path / f"a{suffix}")
    assert found.dtype == np.float32
    if suffix == ".png":  # whose 0 says that there is none
        assert found[4, 6] == 1 / 256
        found[4, 6] = 0
    np.testing.assert_array_equal(found, disparity)


@pytest.mark.parametrize("suffix", FLOW_FILES)
def test_flow_there_and_back(tmp_path, flow, suffix):
    write_flow(tmp_path / f"a{suffix}", flow)
    found = read_flow(tmp_path / f"a{suffix}")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, flow)


@pytest.mark.parametrize(("order", "scale"), [("<", b"-0.003922"), (">", b"1.0")])
def test_pfm_of_both_byte_orders_is_bottom_up(tmp_path, order, scale):
    rows = [[1.5, 2.5, np.inf], [4.5, 5.5, 6.5]]
    data = b"Pf\n3 2\n" + scale + b"\n" + struct.pack(f"{order}6f", *rows[1], *rows[0])
    (tmp_path / "a.pfm").write_bytes(data)
    np.testing.assert_array_equal(read_disparity(tmp_path / "a.pfm"), [[1.5, 2.5, np.nan], [4.5, 5.5, 6.5]])


def test_pfm_is_what_opencv_reads(tmp_path, disparity):
    write_disparity(tmp_path / "a.pfm", disparity)
    other = cv2.imread(str(tmp_path / "a.pfm"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(np.where(np.isinf(other), np.nan, other), disparity)


def test_png_is_kittis(tmp_path):
    write_disparity(tmp_path / "a.png", np.array([[1.0, 2.25, np.nan]]))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), [[256, 576, 0]])


def test_png_of_8_bits_by_its_divisor(tmp_path):
    Image.fromarray(np.array([[0, 4, 255]], np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_disparity(tmp_path / "a.png", 4), [[np.nan, 1, 63.75]])


def test_flow_png_is_kittis(tmp_path):
    write_flow(tmp_path / "a.png", np.array([[[1.0, -2.0], [np.nan, 3.0]]]))
    pixels = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(pixels, [[[2**15 + 64, 2**15 - 128, 1], [0, 0, 0]]])


def test_flo_is_middleburys(tmp_path):
    write_flow(tmp_path / "a.flo", np.array([[[1.0, -2.0], [np.nan, 3.0]]]))
    data = (tmp_path / "a.flo").read_bytes()
    assert data[:4] == b"PIEH"
    assert struct.unpack("<ii4f", data[4:]) == (2, 1, 1.0, -2.0, 1e10, 1e10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pfm", None, "There is no file"),
        ("a.jpg", b"", "ends in none of .pfm, .png, .npy, .npz"),
        ("a.pfm", b"P5\n3 2\n255\n", r"is no PFM: its header is b'P5"),
        ("a.pfm", b"PF\n1 1\n-1\n" + bytes(12), "a PFM of three channels"),
        ("a.pfm", b"Pf\n3 2\n-1\n" + bytes(8), "Could not read"),
        ("a.png", b"\x89PNG", "Could not read"),
        ("a.npy", b"junk", "Could not read"),
        ("a.npz", b"PK junk", "Could not read"),
    ],
)
def test_disparities_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_disparity(tmp_path / name)


def test_what_is_no_disparity(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=re.escape("holds (2, 3, 3); a disparity has one number a pixel")):
        read_disparity(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", one=np.zeros((2, 2)), two=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"holds 2 arrays \(one, two\)"):
        read_disparity(tmp_path / "a.npz")


def test_what_is_no_flow(tmp_path):
    (tmp_path / "a.flo").write_bytes(b"PIEX" + bytes(16))
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    for name, message in (("a.flo", "is no .flo"), ("a.png", "three channels of 16 bits"), ("a.npy", "two numbers")):
        with pytest.raises(DataError, match=message):
            read_flow(tmp_path / name)


@pytest.mark.parametrize(
    ("write", "name", "values", "message"),
    [
        (write_disparity, "a.png", np.full((2, 2), 256.0), "largest disparity is 256.0 pixels.*write .pfm"),
        (write_disparity, "a.flo", np.zeros((2, 2)), "ends in none of"),
        (write_flow, "a.png", np.full((2, 2, 2), -513.0), "beyond 512 pixels.*write .flo"),
        (write_flow, "a.pfm", np.zeros((2, 2, 2)), "ends in none of"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, write, name, values, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / name, values)
    assert list(tmp_path.iterdir()) == []


def test_flow_png_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[images\]'"):
        write_flow(tmp_path / "a.png", np.zeros((2, 2, 2)))
