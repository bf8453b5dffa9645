"""Files of depth: maps in metres or millimetres, and clouds of coloured points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.matching.disparity import write_disparity
from visionattn.errors import InputError
from visionattn.files import atomic_path

__all__ = ["write_depth", "write_point_cloud"]

MOST_MILLIMETRES = 65535


def write_depth(path: str | Path, depth: np.ndarray) -> list[str]:
    """Write a depth map (H, W) in metres; NaN means no depth.

    PNG stores millimetres in 16 bits, and 0 for no depth or more than 65.535 m; the other formats of `write_disparity`
    store metres.

    Returns:
        Notes about what was lost.

    Raises:
        InputError: The suffix is not a supported format.
        StorageError: The file could not be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        write_disparity(path, depth)
        return []
    millimetres = np.rint(np.nan_to_num(depth, nan=0, posinf=0) * 1000.0)
    beyond = millimetres > MOST_MILLIMETRES
    with atomic_path(path) as temporary:
        Image.fromarray(np.where(beyond, 0, millimetres).astype(np.uint16)).save(temporary, "PNG")
    if not beyond.any():
        return []
    return [f"{beyond.mean():.1%} of the depth is beyond the 65.5 m of a PNG in millimetres and became 0"]


def write_point_cloud(
    path: str | Path,
    depth: np.ndarray,
    colours: np.ndarray,
    focal: float,
    principal_point: tuple[float, float] | None = None,
    fy: float | None = None,
) -> None:
    """Write a PLY file (binary, little-endian) of points in metres: x to the right, y down, z away from the camera.

    Args:
        path: The file.
        depth: Depth (H, W) in metres; NaN: no point.
        colours: Colours (H, W, 3), uint8.
        focal: Horizontal focal length in pixels.
        principal_point: Column and row of the principal point; None: the centre of the image.
        fy: Vertical focal length; None: `focal`.

    Raises:
        InputError: Focal length or principal point are not finite.
        StorageError: The file could not be written.
    """
    height, width = depth.shape
    column, row = principal_point or ((width - 1) / 2, (height - 1) / 2)
    if not (0 < focal < np.inf and np.isfinite((column, row)).all()):
        raise InputError(f"Focal length and principal point must be finite; got {focal}, {column} and {row}.")
    rows, columns = np.nonzero(np.isfinite(depth))
    z = depth[rows, columns]
    points = np.empty(len(z), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points["xyz"] = np.stack([(columns - column) * z / focal, (rows - row) * z / (fy or focal), z], axis=1)
    points["rgb"] = colours[rows, columns]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"property uchar {colour}" for colour in ("red", "green", "blue")]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join([*lines, "end_header", ""]).encode())
        file.write(points.tobytes())
