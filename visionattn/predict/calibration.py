"""Camera parameters for depth, from options or from the calibration files of data sets and OpenCV.

| file | recognised by | unit of the baseline |
| --- | --- | --- |
| calib.txt of Middlebury 2014 and 2021 and of ETH3D | `cam0=`, `baseline=`, `doffs=` | millimetres |
| KITTI: calib_cam_to_cam.txt, calib/000000.txt | `P_rect_02:` and `_03:`, `P2:` and `P3:`, else 0 and 1 | metres |
| OpenCV's YAML and JSON after `stereoRectify` | `P1` and `P2`, or `Q` | that of the board; assumed to be metres |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import read_text

__all__ = ["Calibration", "read_calibration"]

LARGEST = 2**20  # maximum size of a file in bytes
FAR = 5.0  # metres; a longer baseline in an OpenCV file is probably in millimetres
KITTI = (("P2", "P3"), ("P_rect_02", "P_rect_03"), ("P0", "P1"), ("P_rect_00", "P_rect_01"))
ASPECT = 0.01  # tolerance of the aspect ratio


@dataclass(frozen=True)
class Calibration:
    """A rectified pair of cameras.

    Attributes:
        focal: Horizontal focal length in pixels.
        baseline: Distance between the cameras in metres.
        doffs: Column of the right view's principal point minus that of the left view, in pixels.
        principal_point: Column and row of the left view's principal point; None: its centre.
        fy: Vertical focal length in pixels; None: `focal`.
        size: Height and width of the calibrated images; None: those of the given images.
        notes: Notes about assumptions.
    """

    focal: float
    baseline: float
    doffs: float = 0.0
    principal_point: tuple[float, float] | None = None
    fy: float | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def at(self, height: int, width: int) -> Calibration:
        """The calibration for images of another size than the calibrated ones.

        Raises:
            InputError: The images have another aspect ratio, so that they were cropped.
        """
        if self.size is None or self.size == (height, width):
            return self
        ratio = width / self.size[1]
        if abs(height / self.size[0] / ratio - 1) > ASPECT:
            raise InputError(
                f"The calibration is for {self.size[0]} x {self.size[1]} pixels, but the images have {height} x "
                f"{width} and were cropped. Give --focal and --baseline."
            )
        point = self.principal_point and (ratio * self.principal_point[0], ratio * self.principal_point[1])
        return replace(
            self,
            focal=ratio * self.focal,
            doffs=ratio * self.doffs,
            principal_point=point,
            fy=self.fy and ratio * self.fy,
            size=(height, width),
            notes=(
                *self.notes,
                f"the calibration for {self.size[0]} x {self.size[1]} pixels was scaled to the images",
            ),
        )


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration file of any supported format.

    Raises:
        DataError: The file is missing or damaged, has an unsupported format, or does not describe a pair of cameras.
    """
    text = read_text(path, LARGEST)
    try:
        if re.search(r"^\s*cam0\s*=", text, re.MULTILINE):
            found = _middlebury(_pairs(text, "="))
        elif re.search(r"^P(_rect_0)?\d:[ \t]*[-+.\d]", text, re.MULTILINE):
            found = _kitti(_pairs(text, ":"))
        else:
            found = _opencv(text, path)
        numbers = (found.focal, found.baseline, found.doffs, found.fy or 1.0, *(found.principal_point or ()))
        if not all(map(math.isfinite, numbers)) or min(found.focal, found.baseline, found.fy or 1.0) <= 0:
            raise ValueError("focal length and baseline must be finite and above 0")
        if found.size is not None and min(found.size) < 1:
            raise ValueError("its size must be at least 1 x 1 pixels")
    except KeyError as error:
        raise DataError(f"The calibration file {shorten(path)} lacks {shorten(error.args[0])}.") from error
    except (ArithmeticError, IndexError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"The calibration file {shorten(path)} is damaged: {shorten(error)}.") from error
    return found


def _pairs(text: str, separator: str) -> dict[str, str]:
    """`name=value` on each line."""
    lines = (line.partition(separator) for line in text.splitlines())
    return {name.strip(): value.strip() for name, mark, value in lines if mark}


def _numbers(text: str, count: int) -> list[float]:
    found = [float(part) for part in text.strip("[]").replace(";", " ").replace(",", " ").split()]
    if len(found) != count:
        raise ValueError(f"{count} numbers are required; got {len(found)}")
    return found


def _middlebury(entries: Mapping[str, str]) -> Calibration:
    camera = _numbers(entries["cam0"], 9)
    size = (int(entries["height"]), int(entries["width"])) if {"height", "width"} <= entries.keys() else None
    return Calibration(
        camera[0],
        float(entries["baseline"]) / 1000,
        float(entries.get("doffs", 0)),
        (camera[2], camera[5]),
        camera[4],
        size,
    )


def _kitti(entries: Mapping[str, str]) -> Calibration:
    names = next((names for names in KITTI if all(name in entries for name in names)), None)
    if names is None:
        raise KeyError("the projections P2 and P3, or P_rect_02 and P_rect_03")
    stated = entries.get(names[0].replace("P_rect", "S_rect"))
    sides = None if stated is None or not names[0].startswith("P_rect") else _numbers(stated, 2)
    found = _of_projections(*(np.reshape(_numbers(entries[name], 12), (3, 4)) for name in names))
    return found if sides is None else replace(found, size=(int(sides[1]), int(sides[0])))


def _of_projections(left: np.ndarray, right: np.ndarray) -> Calibration:
    """Calibration from two projections (3, 4) of rectified cameras: the last column is focal length x position."""
    focal = float(left[0, 0])
    baseline = abs(float(left[0, 3] - right[0, 3])) / focal
    return Calibration(focal, baseline, float(right[0, 2] - left[0, 2]), (left[0, 2], left[1, 2]), float(left[1, 1]))


class _Loader(yaml.SafeLoader):
    """Reads OpenCV's matrices as dictionaries."""


_Loader.add_constructor(
    "tag:yaml.org,2002:opencv-matrix", lambda loader, node: loader.construct_mapping(node, deep=True)
)


def _opencv(text: str, path: str | Path) -> Calibration:
    lines = text.splitlines()
    if lines and lines[0].startswith("%YAML"):  # OpenCV's "%YAML:1.0" is not a valid YAML directive
        lines[0] = ""
    entries: Any = yaml.load("\n".join(lines), _Loader)
    if not isinstance(entries, dict) or not ({"P1", "P2"} <= entries.keys() or "Q" in entries):
        raise DataError(
            f"The calibration file {shorten(path)} must be Middlebury's (cam0=), KITTI's (P2:, P_rect_02:), or "
            "OpenCV's with P1 and P2, or Q, of stereoRectify."
        )
    if {"P1", "P2"} <= entries.keys():
        found = _of_projections(_matrix(entries["P1"], (3, 4)), _matrix(entries["P2"], (3, 4)))
    else:
        q = _matrix(entries["Q"], (4, 4))
        found = Calibration(float(q[2, 3]), abs(1 / float(q[3, 2])), float(q[3, 3] / q[3, 2]), (-q[0, 3], -q[1, 3]))
    size = entries.get("imageSize") or entries.get("image_size")
    if size is None and {"image_height", "image_width"} <= entries.keys():
        size = [entries["image_width"], entries["image_height"]]
    if found.baseline > FAR:
        found = replace(
            found,
            notes=(
                f"the baseline of {shorten(path)}, {found.baseline:g}, is assumed to be in metres: if it is in "
                f"millimetres, give --baseline {found.baseline / 1000:g}",
            ),
        )
    return replace(found, size=None if size is None else (int(size[1]), int(size[0])))


def _matrix(entry: Any, shape: tuple[int, int]) -> np.ndarray:
    data = entry["data"] if isinstance(entry, dict) else entry
    found = np.array(data, np.float64)
    if found.size != math.prod(shape):
        raise ValueError(f"a matrix of {shape[0]} x {shape[1]} numbers is required; got {found.size}")
    return found.reshape(shape)
