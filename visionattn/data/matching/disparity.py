"""Files of disparity and optical flow, read and written: PFM, PNG of 16 bits, .flo, .npy and .npz.

In memory a disparity is (H, W) and a flow (H, W, 2), x first, of float32 in pixels, and NaN says that there is no
value. Each format says that in its own way:

| suffix | what | no value | source |
| --- | --- | --- | --- |
| .pfm | disparity as floats, rows from the bottom up | infinite | Middlebury, SceneFlow |
| .png | disparity times 256 in 16 bits | 0 | KITTI |
| .png | flow times 64 plus 2^15 in 16 bits, and a third channel | third channel 0 | KITTI |
| .flo | flow as floats | above 1e9 | Middlebury |
| .npy, .npz | floats | not finite | numpy |

Files come from outside: each reader checks what the header states against the size of the file before it allocates, and
any failure is one `DataError`.
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
NO_FLOW = 1e9  # a .flo holds larger numbers where there is no value
GREY = ("L", "I", "I;16", "I;16B", "I;16L")  # PIL's modes of PNGs with one number per pixel
PNG_START = b"\x89PNG\r\n\x1a\n"
PFM_GAP = rb"(?:\s|#[^\n]*\n)+"
PFM_HEADER = re.compile(rb"P([fF])" + PFM_GAP + rb"(\d+)" + PFM_GAP + rb"(\d+)" + PFM_GAP + rb"([^\s#]+)\s")
LONGEST_HEADER = 1000  # bytes of a PFM's, which comments may lengthen
DEFLATE = 1100  # more than the largest ratio of size that deflate reaches, 1032


def read_disparity(path: str | Path, divisor: float | Callable[[np.ndarray], float] | None = None) -> np.ndarray:
    """Read a disparity: (H, W) of float32 in pixels, NaN where there is none.

    Args:
        path: A .pfm, .png, .npy or .npz (with one array).
        divisor: What the numbers of a PNG are divided by, such as 4 of Middlebury 2003 at quarter size. Or a function
            that gives it for the numbers (H, W), which are of uint8 in a PNG of 8 bits. None: 256 in 16 bits, as
            KITTI's; 8 bits need a number.

    Raises:
        DataError: The file is missing, damaged, too large, or holds something else.
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
        raise DataError(f"{shorten(path)} holds {values.shape}; a disparity has one number a pixel, (H, W).")
    values = _float32(values)
    return np.where(np.isfinite(values), values, np.float32(np.nan))


def read_png_header(path: str | Path) -> tuple[int, int, int, int]:
    """Height, width, bits per channel and colour type (0 is grey, 2 RGB) of a PNG file.

    Raises:
        DataError: The file is missing, or no PNG.
    """
    with _opened(Path(path)) as (file, _):
        start = file.read(26)
        if len(start) < 26 or not start.startswith(PNG_START):
            raise DataError(f"{shorten(path)} is no PNG file.")
    width, height, depth, colour = struct.unpack(">IIBB", start[16:])
    return height, width, depth, colour


def write_disparity(path: str | Path, disparity: np.ndarray) -> None:
    """Write a disparity (H, W), NaN where there is none, in the format of the suffix, whole or not at all.

    Raises:
        InputError: The suffix is no format, the shape is another one, or a PNG, which holds 0 to below 256 pixels,
            cannot hold the values.
        StorageError: The file could not be written.
    """
    path = Path(path)
    suffix = _known(path, DISPARITY_FILES, InputError)
    if disparity.ndim != 2:
        raise InputError(f"A disparity has one number a pixel, (H, W), but the shape is {disparity.shape}.")
    valid = np.isfinite(disparity)
    values = np.where(valid, disparity, np.nan).astype(np.float32)
    if suffix == ".png":
        least, largest = (float(f(values[valid], initial=0)) for f in (np.min, np.max))
        if least < 0:
            raise InputError(f"The least disparity is {least:.1f} pixels, and PNG begins at 0: write .pfm.")
        if largest * 256 >= 65535.5:
            raise InputError(f"The largest disparity is {largest:.1f} pixels, and PNG ends at 255.99: write .pfm.")
        # 0 says that there is no value, so that the smallest is 1.
        numbers = np.where(valid, np.rint(values * 256).clip(1), 0).astype(np.uint16)
    with atomic_path(path) as temporary:
        if suffix == ".pfm":
            with temporary.open("wb") as file:
                # A negative scale says little-endian.
                file.write(b"Pf\n%d %d\n-1\n" % values.shape[::-1])
                file.write(np.where(valid, values, np.inf)[::-1].astype("<f4").tobytes())
        elif suffix == ".png":
            Image.fromarray(numbers).save(temporary, "PNG")
        else:
            _write_numpy(temporary, values)


def read_flow(path: str | Path) -> np.ndarray:
    """Read an optical flow: (H, W, 2) of float32 in pixels, x first, NaN where there is none.

    Args:
        path: A .flo, .png, .npy or .npz (with one array).

    Raises:
        DataError: The file is missing, damaged, too large, or holds something else.
        MissingPackageError: It is a PNG, and OpenCV is not installed.
    """
    path = Path(path)
    suffix = _known(path, FLOW_FILES)
    readers = {".flo": _read_flo, ".png": _read_flow_png}
    with _opened(path) as (file, size):
        values = readers.get(suffix, _read_numpy)(path, file, size)
    if values.ndim != 3 or values.shape[2] != 2 or not values.size:
        raise DataError(f"{shorten(path)} holds {values.shape}; a flow has two numbers a pixel, (H, W, 2).")
    values = _float32(values)
    valid = (np.abs(values) < NO_FLOW).all(axis=2, keepdims=True)  # false of NaN too
    return np.where(valid, values, np.float32(np.nan))


def write_flow(path: str | Path, flow: np.ndarray) -> None:
    """Write a flow (H, W, 2), NaN where there is none, in the format of the suffix, whole or not at all.

    Raises:
        InputError: The suffix is no format, or a PNG, which ends at 512 pixels, cannot hold the largest.
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
            raise InputError("The flow reaches beyond 512 pixels, where PNG ends: write .flo.")
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
        raise error(f"{shorten(path)} ends in none of {', '.join(suffixes)}.")
    return suffix


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file from outside and its size in bytes; whatever fails while it is read becomes one `DataError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for its writer for ever
            raise DataError(f"Could not read {shorten(path)}: it is not a regular file.")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except VisionAttnError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no file {shorten(path)}.") from error
    except Exception as error:
        # Broken files make numpy, zipfile and zlib raise nearly anything.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"Could not read {shorten(path)}: {shorten(reason).rstrip('.')}.") from error


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite: no value
        return values.astype(np.float32)


def _check_size(path: Path, shape: tuple[int, ...], itemsize: int, stored: int) -> None:
    """Raise `DataError` unless an array of that shape is small enough, and exactly what a file stores."""
    if math.prod(shape) > 2 * MAX_PIXELS:
        size = shorten(" x ".join(map(str, shape)), 60)
        raise DataError(f"Could not read {shorten(path)}: {size} values are more than the {2 * MAX_PIXELS:,} read.")
    needed = math.prod(shape) * itemsize
    if needed != stored:
        size = " x ".join(map(str, shape))
        raise DataError(f"Could not read {shorten(path)}: {size} values take {needed:,} bytes, it holds {stored:,}.")


def _read_pfm(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    start = file.read(LONGEST_HEADER)
    header = PFM_HEADER.match(start)
    if header is None:
        raise DataError(f"{shorten(path)} is no PFM: its header is {start[:20]!r}.")
    if header[1] == b"F":
        raise DataError(f"{shorten(path)} is a PFM of three channels; a disparity has one.")
    width, height = int(header[2]), int(header[3])
    # Of the scale the sign counts, for the order of bytes; Middlebury's files do not mean its size.
    scale = float(header[4])
    if not math.isfinite(scale) or scale == 0:
        raise DataError(f"{shorten(path)} is no PFM: its scale is {scale}; a number below or above 0 is needed.")
    end = header.end()
    # One white space ends the header. Further ones may belong to it or to the values: the size of the file tells.
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
        raise DataError(f"{shorten(path)} is no .flo: it does not begin with {FLO_MAGIC}.")
    width, height = struct.unpack("<ii", start[4:])
    if min(width, height) < 1:
        raise DataError(f"{shorten(path)} is no .flo: its width is {width}, its height {height}.")
    _check_size(path, (height, width, 2), 4, size - 12)
    return np.fromfile(file, "<f4", height * width * 2).reshape(height, width, 2)


def _read_disparity_png(path: Path, divisor: float | Callable[[np.ndarray], float] | None) -> np.ndarray:
    image = open_image(path, ["PNG"])
    if image.mode in ("1", "P"):
        raise DataError(f"{shorten(path)} is a PNG of a palette or of 1 bit; disparities are grey of 8 or 16 bits.")
    numbers = np.asarray(image)
    if image.mode not in GREY:
        return numbers  # whose shape tells
    if divisor is None and numbers.dtype == np.uint8:
        raise DataError(
            f"{shorten(path)} holds disparities in 8 bits times a factor that it does not say: give divisor."
        )
    by = divisor(numbers) if callable(divisor) else 256.0 if divisor is None else divisor
    if not 0 < by < math.inf:
        raise InputError(f"The numbers of {shorten(path)} cannot be divided by {by}: the factor must be above 0.")
    with np.errstate(over="ignore"):
        return np.where(numbers > 0, numbers / np.float32(by), np.float32(np.nan))


def _read_flow_png(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    cv2: Any = require("cv2", "images")
    height, width, *kind = read_png_header(path)
    if kind != [16, 2]:
        raise DataError(f"{shorten(path)} is no PNG of three channels of 16 bits, as KITTI's flow is.")
    if width * height > min(MAX_PIXELS, DEFLATE * size):
        raise DataError(f"Could not read {shorten(path)}: it cannot hold {width} x {height} pixels.")
    open_image(path, ["PNG"])  # PIL gives 8 bits only, but says what is damaged; OpenCV prints lines of its own
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] != (3,):
        raise DataError(f"{shorten(path)} is no PNG of three channels of 16 bits, as KITTI's flow is.")
    numbers = pixels[..., ::-1].astype(np.float32)  # OpenCV gives blue first
    return np.where(numbers[..., 2:] > 0, (numbers[..., :2] - 2**15) / 64, np.nan)


def _read_numpy(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    if file.read(2) != b"PK":
        file.seek(0)
        return _read_npy(path, file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(members) != 1:
            raise DataError(f"{shorten(path)} holds {len(members)} arrays ({shorten(', '.join(names))}), not one.")
        member = members[0]
        packed = 1 if member.compress_type == zipfile.ZIP_STORED else DEFLATE
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"Could not read {shorten(path)}: it is compressed by another method than numpy's.")
        if member.file_size > packed * min(member.compress_size, size):
            raise DataError(f"Could not read {shorten(path)}: it cannot hold the {member.file_size:,} bytes it states.")
        with archive.open(member) as content:
            return _read_npy(path, content, member.file_size)


def _read_npy(path: Path, file: IO[bytes], size: int) -> np.ndarray:
    """The array of an opened .npy file of that size, which may be a member of an archive."""
    header: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in header:
        raise DataError(f"Could not read {shorten(path)}: arrays of .npy version {version} are not numbers.")
    shape, by_column, dtype = header[version](file)
    if dtype.kind not in "fiu":
        raise DataError(f"{shorten(path)} holds values of type {shorten(dtype)}; numbers are needed.")
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
