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
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.errors import DataError, InputError, VisionAttnError, require
from visionattn.files import atomic_path

__all__ = ["DISPARITY_FILES", "FLOW_FILES", "read_disparity", "read_flow", "write_disparity", "write_flow"]

DISPARITY_FILES = (".pfm", ".png", ".npy", ".npz")
FLOW_FILES = (".flo", ".png", ".npy", ".npz")
FLO_MAGIC = np.float32(202021.25)
NO_FLOW = 1e9  # a .flo holds larger numbers where there is no value


def read_disparity(path: str | Path, divisor: float = 256.0) -> np.ndarray:
    """Read a disparity: (H, W) of float32 in pixels, NaN where there is none.

    Args:
        path: A .pfm, .png, .npy or .npz (with one array).
        divisor: What the numbers of a PNG are divided by: 256 of KITTI, 4 of Middlebury 2003 at quarter size.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    path = Path(path)
    suffix = _known(path, DISPARITY_FILES)
    with _reading(path):
        if suffix == ".pfm":
            values = _read_pfm(path)
        elif suffix == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                numbers = np.asarray(image)
            values = np.where(numbers > 0, numbers / np.float32(divisor), np.nan)
        else:
            values = _read_numpy(path)
    if values.ndim != 2:
        raise DataError(f"{path} holds {values.shape}; a disparity has one number a pixel, (H, W).")
    return np.where(np.isfinite(values), values, np.nan).astype(np.float32)


def write_disparity(path: str | Path, disparity: np.ndarray) -> None:
    """Write a disparity (H, W), NaN where there is none, in the format of the suffix, whole or not at all.

    Raises:
        InputError: The suffix is no format, or a PNG, which ends below 256 pixels, cannot hold the largest.
        StorageError: The file could not be written.
    """
    path = Path(path)
    suffix = _known(path, DISPARITY_FILES, InputError)
    valid = np.isfinite(disparity)
    values = np.where(valid, disparity, np.nan).astype(np.float32)
    if suffix == ".png":
        largest = float(values[valid].max(initial=0))
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
        DataError: There is no such file, or it holds something else.
        MissingPackageError: It is a PNG, and OpenCV is not installed.
    """
    path = Path(path)
    suffix = _known(path, FLOW_FILES)
    with _reading(path):
        if suffix == ".flo":
            values = _read_flo(path)
        elif suffix == ".png":
            values = _read_flow_png(path)
        else:
            values = _read_numpy(path)
    if values.ndim != 3 or values.shape[2] != 2:
        raise DataError(f"{path} holds {values.shape}; a flow has two numbers a pixel, (H, W, 2).")
    valid = (np.abs(values) < NO_FLOW).all(axis=2, keepdims=True)  # false of NaN too
    return np.where(valid, values, np.nan).astype(np.float32)


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
        raise error(f"{path} ends in none of {', '.join(suffixes)}.")
    return suffix


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except VisionAttnError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    # Broken files make PIL and numpy raise nearly anything.
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"Could not read {path}: {str(error).rstrip('.')}.") from error


def _read_pfm(path: Path) -> np.ndarray:
    data = path.read_bytes()
    header = re.match(rb"P([fF])\s+(\d+)\s+(\d+)\s+(\S+)\s", data[:100])
    if header is None:
        raise DataError(f"{path} is no PFM: its header is {data[:20]!r}.")
    if header[1] == b"F":
        raise DataError(f"{path} is a PFM of three channels; a disparity has one.")
    width, height = int(header[2]), int(header[3])
    # Of the scale the sign counts, for the order of bytes; Middlebury's files do not mean its size.
    values = np.frombuffer(data, "<f4" if float(header[4]) < 0 else ">f4", height * width, header.end())
    return values.reshape(height, width)[::-1]


def _read_flo(path: Path) -> np.ndarray:
    data = path.read_bytes()
    if np.frombuffer(data, "<f4", 1)[0] != FLO_MAGIC:
        raise DataError(f"{path} is no .flo: it does not begin with {FLO_MAGIC}.")
    width, height = map(int, np.frombuffer(data, "<i4", 2, 4))
    return np.frombuffer(data, "<f4", height * width * 2, 12).reshape(height, width, 2)


def _read_flow_png(path: Path) -> np.ndarray:
    cv2: Any = require("cv2", "images")
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] != (3,):
        raise DataError(f"{path} is no PNG of three channels of 16 bits, as KITTI's flow is.")
    numbers = pixels[..., ::-1].astype(np.float32)  # OpenCV gives blue first
    return np.where(numbers[..., 2:] > 0, (numbers[..., :2] - 2**15) / 64, np.nan)


def _read_numpy(path: Path) -> np.ndarray:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content.astype(np.float32)
    with content:
        if len(content.files) != 1:
            raise DataError(f"{path} holds {len(content.files)} arrays ({', '.join(content.files)}), not one.")
        return content[content.files[0]].astype(np.float32)


def _write_numpy(path: Path, values: np.ndarray) -> None:
    if path.suffix.lower() == ".npy":
        np.save(path, values)
    else:
        np.savez_compressed(path, values)
