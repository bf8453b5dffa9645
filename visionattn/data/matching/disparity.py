"""Disparity and optical flow files, read and written: PFM, 16-bit PNG, .flo, .npy and .npz.

In memory a disparity is float32 (H, W) and a flow float32 (H, W, 2), x first, in pixels; NaN marks missing values.
Each format marks them in its own way:

| suffix | content | no value | source |
| --- | --- | --- | --- |
| .pfm | disparity as floats, rows from the bottom up | infinite | Middlebury, SceneFlow |
| .png | disparity times 256, 16 bits | 0 | KITTI |
| .png | flow times 64 plus 2^15, 16 bits, and a mask as third channel | third channel 0 | KITTI |
| .flo | flow as floats | above 1e9 | Middlebury |
| .npy, .npz | floats | not finite | numpy |

Files are untrusted: each reader checks the header against the file size before it allocates, and every failure is one
`DataError`.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from visionattn.data.images import MAX_PIXELS, open_image
from visionattn.errors import DataError, InputError, VisionAttnError, require, shorten
from visionattn.files import atomic_path

__all__ = [
    "DISPARITY_FILES",
    "FLOW_FILES",
    "read_disparity",
    "read_flow",
    "read_png_header",
    "write_disparity",
    "write_flow",
]

DISPARITY_FILES = (".pfm", ".png", ".npy", ".npz")
FLOW_FILES = (".flo", ".png", ".npy", ".npz")
FLO_MAGIC = np.float32(202021.25)
NO_FLOW = 1e9  # larger values in a .flo mark missing values
GREY = ("L", "I", "I;16", "I;16B", "I;16L")  # PIL modes of PNGs with one channel
PNG_START = b"\x89PNG\r\n\x1a\n"
PFM_GAP = rb"(?:\s|#[^\n]*\n)+"
PFM_HEADER = re.compile(rb"P([fF])" + PFM_GAP + rb"(\d+)" + PFM_GAP + rb"(\d+)" + PFM_GAP + rb"([^\s#]+)\s")
LONGEST_HEADER = 1000  # bytes of a PFM header, which may contain comments
DEFLATE = 1100  # above 1032, the largest compression ratio of deflate


def read_disparity(path: str | Path, divisor: float | Callable[[np.ndarray], float] | None = None) -> np.ndarray:
    """Read a disparity: float32 (H, W) in pixels, NaN where there is none.

    Args:
        path: A .pfm, .png, .npy or .npz (with a single array).
        divisor: Divisor of PNG values, such as 4 for Middlebury 2003 at quarter size, or a function that returns it for
            the values (H, W), which are uint8 in an 8-bit PNG. None: 256 for 16 bits, as in KITTI; 8 bits require
            a divisor.

    Raises:
        DataError: The file is missing, damaged, too large, or has other content.
        InputError: The divisor is not a finite number above 0.
    """
    path = Path(path)
    suffix = _known(path, DISPARITY_FILES)
    if suffix == ".png":
        values = _read_disparity_png(path, divisor)
    else:
        with _opened(path) as (file, size):
            values = _read_pfm(path, file, size) if suffix == ".pfm" else _read_numpy(path, file, size)
    if values.ndim != 2 or not values.size:
        raise DataError(f"{shorten(path)} must hold one number per pixel, (H, W); its shape is {values.shape}.")
    values = _float32(values)
    return np.where(np.isfinite(values), values, np.float32(np.nan))


def read_png_header(path: str | Path) -> tuple[int, int, int, int]:
    """Height, width, bits per channel and colour type (0 is grey, 2 RGB) of a PNG file.

    Raises:
        DataError: The file is missing or not a PNG.
    """
    with _opened(Path(path)) as (file, _):
        start = file.read(26)
        if len(start) < 26 or not start.startswith(PNG_START):
            raise DataError(f"{shorten(path)} is not a PNG file.")
    width, height, depth, colour = struct.unpack(">IIBB", start[16:])
    return height, width, depth, colour


def write_disparity(path: str | Path, disparity: np.ndarray) -> None:
    """Write a disparity (H, W), NaN where there is none, atomically in the format of the suffix.

    Raises:
        InputError: The suffix or the shape is not supported, or the values do not fit a PNG, which holds 0 to
            256 pixels (exclusive).
        StorageError: The file could not be written.
    """
    path = Path(path)
    suffix = _known(path, DISPARITY_FILES, InputError)
    if disparity.ndim != 2:
        raise InputError(f"A disparity must have one number per pixel, (H, W); its shape is {disparity.shape}.")
    valid = np.isfinite(disparity)
    values = np.where(valid, disparity, np.nan).astype(np.float32)
    if suffix == ".png":
        least, largest = (float(f(values[valid], initial=0)) for f in (np.min, np.max))
        if least < 0:
            raise InputError(f"The smallest disparity is {least:.1f} pixels; a PNG holds 0 to 255.99: write .pfm.")
        if largest * 256 >= 65535.5:
            raise InputError(f"The largest disparity is {largest:.1f} pixels; a PNG holds 0 to 255.99: write .pfm.")
        # 0 means no value, so the smallest value is 1.
        numbers = np.where(valid, np.rint(values * 256).clip(1), 0).astype(np.uint16)
    with atomic_path(path) as temporary:
        if suffix == ".pfm":
            with temporary.open("wb") as file:
                # A negative scale means little-endian.
                file.write(b"Pf\n%d %d\n-1\n" % values.shape[::-1])
                file.write(np.where(valid, values, np.inf)[::-1].astype("<f4").tobytes())
        elif suffix == ".png":
            Image.fromarray(numbers).save(temporary, "PNG")
        else:
            _write_numpy(temporary, values)


def read_flow(path: str | Path) -> np.ndarray:
    """Read an optical flow: float32 (H, W, 2) in pixels, x first, NaN where there is none.

    Args:
        path: A .flo, .png, .npy or .npz (with a single array).

    Raises:
        DataError: The file is missing, damaged, too large, or has other content.
        MissingPackageError: It is a PNG, and OpenCV is not installed.
    """
    path = Path(path)
    suffix = _known(path, FLOW_FILES)
    readers = {".flo": _read_flo, ".png": _read_flow_png}
    with _opened(path) as (file, size):
        values = readers.get(suffix, _read_numpy)(path, file, size)
    if values.ndim != 3 or values.shape[2] != 2 or not values.size:
        raise DataError(f"{shorten(path)} must hold two numbers per pixel, (H, W, 2); its shape is {values.shape}.")
    values = _float32(values)
    valid = (np.abs(values) < NO_FLOW).all(axis=2, keepdims=True)  # also false for NaN
    return np.where(valid, values, np.float32(np.nan))


def write_flow(path: str | Path, flow: np.ndarray) -> None:
    """Write a flow (H, W, 2), NaN where there is none, atomically in the format of the suffix.

    Raises:
        InputError: The suffix is not supported, or a value does not fit a PNG, which holds up to 512 pixels.
        StorageError: The file could not be written.
        MissingPackageError: It is a PNG, and OpenCV is not installed.
    """
    path = Path(path)
    suffix = _known(path, FLOW_FILES, InputError)
    valid = np.isfinite(flow).all(axis=2, keepdims=True)
    values = np.where(valid, flow, np.nan).astype(np.float32)
    if suffix == ".png":
        numbers = np.where(valid, np.rint(values * 64 + 2**15), 0)
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) > 65535:
            raise InputError("The flow exceeds 512 pixels, the limit of a PNG: write .flo.")
        rgb = np.concatenate([numbers, valid], axis=2).astype(np.uint16)
        cv2: Any = require("cv2", "images")
        encoded = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes()
    with atomic_path(path) as temporary:
        if suffix == ".flo":
            with temporary.open("wb") as file:
                file.write(FLO_MAGIC.astype("<f4").tobytes())
                file.write(np.array(values.shape[1::-1], "<i4").tobytes())
                file.write(np.where(valid, values, 10 * NO_FLOW).astype("<f4").tobytes())
        elif suffix == ".png":
            temporary.write_bytes(encoded)
        else:
            _write_numpy(temporary, values)


def _known(path: Path, suffixes: tuple[str, ...], error: type[VisionAttnError] = DataError) -> str:
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise error(f"{shorten(path)} must end in one of {', '.join(suffixes)}.")
    return suffix


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """An untrusted file and its size in bytes; every failure while it is read becomes one `DataError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise DataError(f"Could not read {shorten(path)}: it is not a regular file.")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except VisionAttnError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no file {shorten(path)}.") from error
    except Exception as error:
        # numpy, zipfile and zlib raise almost any exception for damaged files.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"Could not read {shorten(path)}: {shorten(reason).rstrip('.')}.") from error


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # values beyond float32 become infinite: no value
        return values.astype(np.float32)


def _check_size(path: Path, shape: tuple[int, ...], itemsize: int, stored: int) -> None:
    """Raise `DataError` unless an array of that shape is small enough and matches the stored number of bytes."""
    if math.prod(shape) > 2 * MAX_PIXELS:
        size = shorten(" x ".join(map(str, shape)), 60)
        raise DataError(f"Could not read {shorten(path)}: {size} values exceed the limit of {2 * MAX_PIXELS:,}.")
    needed = math.prod(shape) * itemsize
    if needed != stored:
        size = " x ".join(map(str, shape))
        raise DataError(f"Could not read {shorten(path)}: {size} values need {needed:,} bytes; it has {stored:,}.")


def _read_pfm(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    start = file.read(LONGEST_HEADER)
    header = PFM_HEADER.match(start)
    if header is None:
        raise DataError(f"{shorten(path)} is not a PFM file: its header is {start[:20]!r}.")
    if header[1] == b"F":
        raise DataError(f"{shorten(path)} is a PFM file with three channels; a disparity has one.")
    width, height = int(header[2]), int(header[3])
    # Only the sign of the scale is used, for the byte order; Middlebury's files do not intend its magnitude.
    scale = float(header[4])
    if not math.isfinite(scale) or scale == 0:
        raise DataError(
            f"{shorten(path)} is not a PFM file: its scale must be a finite number other than 0; got {scale}."
        )
    end = header.end()
    # One white-space character ends the header. More can belong to it or to the values: the file size decides.
    behind = size - end - 4 * height * width
    if behind > 0 and start[end : end + behind].isspace():
        end += behind
    _check_size(path, (height, width), 4, size - end)
    file.seek(end)
    values = np.fromfile(file, "<f4" if scale < 0 else ">f4", height * width)
    return values.reshape(height, width)[::-1]


def _read_flo(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    start = file.read(12)
    if start[:4] != FLO_MAGIC.astype("<f4").tobytes():
        raise DataError(f"{shorten(path)} is not a .flo file: it does not begin with {FLO_MAGIC}.")
    width, height = struct.unpack("<ii", start[4:])
    if min(width, height) < 1:
        raise DataError(f"{shorten(path)} is not a .flo file: its size is {width} x {height}.")
    _check_size(path, (height, width, 2), 4, size - 12)
    return np.fromfile(file, "<f4", height * width * 2).reshape(height, width, 2)


def _read_disparity_png(path: Path, divisor: float | Callable[[np.ndarray], float] | None) -> np.ndarray:
    image = open_image(path, ["PNG"])
    if image.mode in ("1", "P"):
        raise DataError(f"{shorten(path)} is a palette or 1-bit PNG; disparities must be grey with 8 or 16 bits.")
    numbers = np.asarray(image)
    if image.mode not in GREY:
        return numbers  # the caller rejects the shape
    if divisor is None and numbers.dtype == np.uint8:
        raise DataError(f"{shorten(path)} holds 8-bit disparities with an unknown scale factor: give divisor.")
    by = divisor(numbers) if callable(divisor) else 256.0 if divisor is None else divisor
    if not 0 < by < math.inf:
        raise InputError(f"The divisor of {shorten(path)} must be a number above 0; got {by}.")
    with np.errstate(over="ignore"):
        return np.where(numbers > 0, numbers / np.float32(by), np.float32(np.nan))


def _read_flow_png(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    cv2: Any = require("cv2", "images")
    height, width, *kind = read_png_header(path)
    if kind != [16, 2]:
        raise DataError(f"{shorten(path)} is not a 16-bit PNG with three channels, as in KITTI.")
    if width * height > min(MAX_PIXELS, DEFLATE * size):
        raise DataError(f"Could not read {shorten(path)}: it is too short for {width} x {height} pixels.")
    open_image(path, ["PNG"])  # PIL reads 8 bits only, but reports damage; OpenCV prints to stderr
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] != (3,):
        raise DataError(f"{shorten(path)} is not a 16-bit PNG with three channels, as in KITTI.")
    numbers = pixels[..., ::-1].astype(np.float32)  # OpenCV returns BGR
    return np.where(numbers[..., 2:] > 0, (numbers[..., :2] - 2**15) / 64, np.nan)


def _read_numpy(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    if file.read(2) != b"PK":
        file.seek(0)
        return _read_npy(path, file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(members) != 1:
            raise DataError(f"{shorten(path)} must hold one array, not {len(members)} ({shorten(', '.join(names))}).")
        member = members[0]
        packed = 1 if member.compress_type == zipfile.ZIP_STORED else DEFLATE
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"Could not read {shorten(path)}: its compression method is not numpy's.")
        if member.file_size > packed * min(member.compress_size, size):
            raise DataError(f"Could not read {shorten(path)}: it is too short for {member.file_size:,} bytes.")
        with archive.open(member) as content:
            return _read_npy(path, content, member.file_size)


def _read_npy(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    """The array of an open .npy file of that size, which can be a member of an archive."""
    header: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in header:
        raise DataError(f"Could not read {shorten(path)}: .npy version {version} is not supported.")
    shape, by_column, dtype = header[version](file)
    if dtype.kind not in "fiu":
        raise DataError(f"{shorten(path)} must hold numbers; its dtype is {shorten(dtype)}.")
    if any(side < 0 for side in shape):
        raise DataError(f"Could not read {shorten(path)}: its shape is {shorten(shape)}.")
    _check_size(path, shape, dtype.itemsize, size - file.tell())
    values = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
    return values.reshape(shape, order="F" if by_column else "C")


def _write_numpy(path: Path, values: np.ndarray) -> None:
    if path.suffix.lower() == ".npy":
        np.save(path, values)
    else:
        np.savez_compressed(path, values)
