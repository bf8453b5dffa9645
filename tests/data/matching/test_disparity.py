"""Disparity and flow there and back, NaN where there is no value; the bytes are those of the formats' definitions."""

import io
import os
import re
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from visionattn.data.matching.disparity import (
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


def test_png_of_8_bits_without_a_divisor(tmp_path):
    Image.fromarray(np.full((2, 3), 24, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="8-bit disparities with an unknown scale factor: give divisor"):
        read_disparity(tmp_path / "a.png")


@pytest.mark.parametrize("end", [b"\n", b" \n", b"\r\n", b" \r\n", b"\t "])
def test_white_space_behind_the_header_of_a_pfm(tmp_path, end):
    values = np.arange(6, dtype="<f4").reshape(2, 3) + 1
    (tmp_path / "a.pfm").write_bytes(b"Pf\n3 2\n-1.0" + end + values[::-1].tobytes())
    np.testing.assert_array_equal(read_disparity(tmp_path / "a.pfm"), values)


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
        ("a.jpg", b"", "must end in one of .pfm, .png, .npy, .npz"),
        ("a.pfm", b"P5\n3 2\n255\n", r"is not a PFM file: its header is b'P5"),
        ("a.pfm", b"PF\n1 1\n-1\n" + bytes(12), "a PFM file with three channels"),
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
    with pytest.raises(DataError, match=re.escape("one number per pixel, (H, W); its shape is (2, 3, 3)")):
        read_disparity(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", one=np.zeros((2, 2)), two=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"one array, not 2 \(one, two\)"):
        read_disparity(tmp_path / "a.npz")


def test_what_is_no_flow(tmp_path):
    (tmp_path / "a.flo").write_bytes(b"PIEX" + bytes(16))
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    for name, message in (
        ("a.flo", "is not a .flo file"),
        ("a.png", "16-bit PNG with three channels"),
        ("a.npy", "two numbers"),
    ):
        with pytest.raises(DataError, match=message):
            read_flow(tmp_path / name)


@pytest.mark.parametrize(
    ("write", "name", "values", "message"),
    [
        (write_disparity, "a.png", np.full((2, 2), 256.0), "largest disparity is 256.0 pixels.*write .pfm"),
        (write_disparity, "a.flo", np.zeros((2, 2)), "must end in one of"),
        (write_flow, "a.png", np.full((2, 2, 2), -513.0), "exceeds 512 pixels.*write .flo"),
        (write_flow, "a.pfm", np.zeros((2, 2, 2)), "must end in one of"),
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


def test_pfm_with_any_line_ends_and_comments(tmp_path):
    values = struct.pack("<2f", 1.5, -2.5)
    for header in (b"Pf\r\n2 1\r\n-1.0\r\n", b"Pf 2 1 -1 ", b"Pf\n# by a camera\n2\n1\n-1\n", b"Pf\r2\r1\r-1\r"):
        (tmp_path / "a.pfm").write_bytes(header + values)
        assert read_disparity(tmp_path / "a.pfm").tolist() == [[1.5, -2.5]], header


def test_a_line_feed_can_be_the_first_byte_of_a_pfms_values(tmp_path):
    values = b"\n" + struct.pack("<f", 1.0)[1:]
    for end in (b"\r", b"\n", b"\r\n"):
        (tmp_path / "a.pfm").write_bytes(b"Pf\n1 1\n-1" + end + values)
        assert read_disparity(tmp_path / "a.pfm")[0, 0] == struct.unpack("<f", values)[0]


def npy(dtype, shape, data=b"", order="False"):
    """The bytes of an .npy file with that header."""
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(content, method=zipfile.ZIP_DEFLATED, name="arr_0.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def png(width, height, depth, colour, rows=b""):
    """The bytes of a PNG file of any stated size."""
    chunks = ((b"IHDR", struct.pack(">II5B", width, height, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    parts = (
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_numpy_of_both_orders_and_kinds(tmp_path):
    values = np.arange(6, dtype=np.int16).reshape(2, 3)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    np.savez(tmp_path / "b.npz", values.astype(">f8"))
    (tmp_path / "c.npy").write_bytes(npz(npy("'<i2'", (2, 3), values.tobytes())))
    for name in ("a.npy", "b.npz", "c.npy"):
        np.testing.assert_array_equal(read_disparity(tmp_path / name), values)
    np.save(tmp_path / "a.npy", np.array([[1e300, np.inf, 1.0]]))
    np.testing.assert_array_equal(read_disparity(tmp_path / "a.npy"), [[np.nan, np.nan, 1]])


BROKEN_DEFLATE = bytearray(npz(npy("'<f4'", (20, 20), np.random.default_rng(0).bytes(1600))))
BROKEN_DEFLATE[200:230] = bytes(30)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pfm", b"Pf\n2 1\nnan\n" + bytes(8), "its scale must be .*; got nan"),
        ("a.pfm", b"Pf\n2 1\n0\n" + bytes(8), "its scale must be .*; got 0.0"),
        ("a.pfm", b"Pf\n2 1\n-inf\n" + bytes(8), "its scale must be .*; got -inf"),
        ("a.pfm", b"Pf\n2 1\none\n" + bytes(8), "Could not read .*could not convert string to float"),
        ("a.pfm", b"Pf\n2 1\n-1\n" + bytes(9), "1 x 2 values need 8 bytes; it has 9"),  # line ends were changed
        ("a.pfm", b"Pf\n1000000000 1000000000\n-1\n" + bytes(8), "values exceed the limit of 1,073,741,824"),
        ("a.pfm", b"Pf\n" + b"9" * 500 + b" 1\n-1\n", r"1 x 999+ \.\.\. 9+ values exceed the limit"),
        ("a.pfm", b"Pf\n0 0\n-1\n", r"its shape is \(0, 0\)"),
        ("a.npy", npy("[('a', '<f4'), ('b', '<f4')]", (1, 1), bytes(8)), "must hold numbers; its dtype is"),
        ("a.npy", npy("'|O'", (1, 1), b"cos\nsystem\n."), "must hold numbers; its dtype is object"),
        ("a.npy", npy("'<c8'", (1, 1), bytes(8)), "must hold numbers; its dtype is complex64"),
        ("a.npy", npy("'<f4'", (10**6, 10**6)), "1000000 x 1000000 values exceed the limit"),
        ("a.npy", npy("'<f4'", (10**30, 1)), "values exceed the limit"),
        ("a.npy", npy("'<f4'", (-1, -4), bytes(16)), r"its shape is \(-1, -4\)"),
        ("a.npy", npy("'<f4'", (2, 2), bytes(12)), "2 x 2 values need 16 bytes; it has 12"),
        ("a.npy", npy("'<f4'", "(" * 300 + ")" * 300), "Could not read"),
        ("a.npy", b"\x93NUMPY\x09\x00", "version .* are not numbers|Could not read"),
        ("a.npz", npz(b"no array", name="a.txt"), "Could not read"),
        ("a.npz", npz(npy("'<f4'", (2**29, 1))), "it has 0"),
        ("a.npz", bytes(BROKEN_DEFLATE), "Could not read"),
        ("a.npz", npz(npy("'<f4'", (1, 1), bytes(4)), zipfile.ZIP_LZMA), "its compression method is not numpy's"),
        ("a.png", png(2, 1, 8, 3), "Could not read|palette"),
        ("a.png", png(1, 1, 8, 4, bytes(3)), r"its shape is \(1, 1, 2\)"),
        ("a.png", png(2**30, 2**30, 16, 0), "Could not read the image"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Could not read the image"),
    ],
)
def test_hostile_disparities_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_disparity(tmp_path / name)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.flo", b"PIEH" + struct.pack("<ii", -2, -1) + bytes(16), "its size is -2 x -1"),
        ("a.flo", b"PIEH" + struct.pack("<ii", 2**31 - 1, 2**31 - 1), "values exceed the limit"),
        ("a.flo", b"PIEH" + struct.pack("<ii", 2, 1) + bytes(15), "1 x 2 x 2 values need 16 bytes; it has 15"),
        ("a.flo", b"PIEH\x01", "Could not read"),
        ("a.png", png(2**20, 2**20, 16, 2), "it is too short for 1048576 x 1048576 pixels"),
        ("a.png", png(2, 2, 16, 2, bytes(5)), "Could not read"),
        ("a.png", b"", "is not a PNG file"),
        ("a.npy", npy("'<i8'", (1, 1, 2), struct.pack("<qq", -(2**63), 1)), None),
    ],
)
def test_hostile_flows_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    if message is None:  # beyond what says that there is no value
        assert np.isnan(read_flow(tmp_path / name)).all()
        return
    with pytest.raises(DataError, match=message) as error:
        read_flow(tmp_path / name)
    assert "\n" not in str(error.value)


def test_files_that_state_more_than_they_hold_take_no_memory(tmp_path):
    content = bytearray(npz(npy("'<f4'", (2**28, 2))))
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 2**31 + 128)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="it is too short for 2,147,483,776 bytes"):
        read_disparity(tmp_path / "a.npz")


def test_what_is_no_regular_file(tmp_path):
    for name in ("a.pfm", "a.npy"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="not a regular file"):
            read_disparity(tmp_path / name)
    (tmp_path / "b.flo").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        read_flow(tmp_path / "b.flo")
    with pytest.raises(DataError, match=r"Could not read .*: File name too long"):
        read_disparity(tmp_path / ("a" * 300 + ".pfm"))
    with pytest.raises(DataError, match=r"Could not read .*: embedded null byte"):
        read_disparity("a\0.npy")


@pytest.mark.parametrize("divisor", [0, -4.0, float("nan"), float("inf")])
def test_a_divisor_that_makes_no_sense(tmp_path, divisor):
    Image.new("L", (3, 2), 5).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"must be a number above 0; got {divisor}"):
        read_disparity(tmp_path / "a.png", divisor)


def test_a_divisor_by_the_numbers(tmp_path):
    for dtype, expected in ((np.uint8, 2.5), (np.uint16, 5)):
        Image.fromarray(np.full((2, 3), 10, dtype)).save(tmp_path / "a.png")
        found = read_disparity(tmp_path / "a.png", lambda numbers: 4 if numbers.dtype == np.uint8 else 2)
        assert found.tolist() == [[expected] * 3] * 2


def test_a_png_holds_no_negative_disparity(tmp_path):
    with pytest.raises(
        InputError, match=r"The smallest disparity is -3\.0 pixels; a PNG holds 0 to 255\.99: write \.pfm"
    ):
        write_disparity(tmp_path / "a.png", np.array([[1.0, -3.0]]))
    with pytest.raises(InputError, match="its shape is"):
        write_disparity(tmp_path / "a.pfm", np.zeros((2, 2, 2)))
    assert list(tmp_path.iterdir()) == []
