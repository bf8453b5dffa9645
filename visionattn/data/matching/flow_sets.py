"""Folders of image pairs with ground-truth optical flow, in the layouts of their datasets.

| layout | dataset | first, second | ground truth | non-occluded |
| --- | --- | --- | --- | --- |
| sintel | MPI Sintel | clean/ and final/SCENE/frame_N.png, the next | flow/SCENE/frame_N.flo | occlusions/ |
| chairs | FlyingChairs | N_img1.ppm, N_img2.ppm | N_flow.flo | where the match is inside |
| kitti | KITTI 2015, 2012 | image_2/ or colored_0/N_10.png, N_11.png | flow_occ/N_10.png | flow_noc/ |

The folder can be `training` or `data`, or its parent. The ground truth is from the first image to the second only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionattn.data.images import list_images, read_rgb
from visionattn.data.matching.disparity import read_flow
from visionattn.data.matching.pairs import MatchPair, matches_inside
from visionattn.data.matching.stereo_files import check_folder, files_below, read_mask
from visionattn.errors import ConfigError, DataError, shorten

__all__ = ["FLOW_LAYOUTS", "FlowScene", "find_flow_scenes"]


@dataclass(frozen=True)
class FlowScene:
    """The files of a pair.

    Attributes:
        name: Name in tables.
        first: First image.
        second: Second image.
        truth: Flow from the first to the second.
        hidden: Image that is not 0 where a pixel of the first is occluded in the second.
        shown: Flow that is known only where a pixel is not occluded.
        invalid: Image that is not 0 where the ground truth is invalid.
    """

    name: str
    first: Path
    second: Path
    truth: Path
    hidden: Path | None = None
    shown: Path | None = None
    invalid: Path | None = None

    def read(self) -> MatchPair:
        """Read all files; the second image has no ground truth.

        Raises:
            DataError: A file is damaged, or sizes differ.
        """
        views, flow = [read_rgb(path) for path in (self.first, self.second)], read_flow(self.truth)
        shapes = [array.shape[:2] for array in (*views, flow)]
        if len(set(shapes)) > 1:
            sizes = ", ".join("{} x {}".format(*shape) for shape in shapes)
            raise DataError(
                f"{shorten(self.first)}, {shorten(self.second.name)} and {shorten(self.truth.name)} differ in size: "
                f"{sizes}."
            )
        if self.invalid is not None:
            flow = np.where(self._mask(self.invalid, shapes[0])[..., None], np.float32(np.nan), flow)
        seen = matches_inside(flow)
        if self.hidden is not None:
            seen &= ~self._mask(self.hidden, shapes[0])
        if self.shown is not None:
            seen &= self._of_size(self.shown, np.isfinite(read_flow(self.shown)).all(-1), shapes[0])
        unknown = np.full_like(flow, np.nan)
        return MatchPair(np.stack(views), np.stack([flow, unknown]), np.stack([seen, np.zeros_like(seen)]))

    def _mask(self, path: Path, size: tuple[int, ...]) -> np.ndarray:
        return self._of_size(path, read_mask(path, above=0), size)

    def _of_size(self, path: Path, mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        if mask.shape != size:
            sizes = " and ".join("{} x {}".format(*shape) for shape in (mask.shape, size))
            raise DataError(f"{shorten(path)} and {shorten(self.first)} differ in size: {sizes}.")
        return mask


def find_flow_scenes(folders: str | Path | Iterable[str | Path], layout: str | None = None) -> list[FlowScene]:
    """The pairs with ground truth in folders, sorted by name in each.

    Args:
        folders: Dataset folders.
        layout: One of `FLOW_LAYOUTS`; None detects it.

    Raises:
        ConfigError: The layout is unknown.
        DataError: A folder does not exist or holds no pair of a layout.
    """
    if layout is not None and layout not in FLOW_LAYOUTS:
        raise ConfigError(f"layout must be one of {', '.join(map(repr, FLOW_LAYOUTS))}; got {shorten(layout)!r}.")
    scenes = []
    for folder in map(check_folder, [folders] if isinstance(folders, (str, Path)) else folders):
        finders = FLOW_LAYOUTS.values() if layout is None else [FLOW_LAYOUTS[layout]]
        found = next((found for finder in finders if (found := list(finder(folder)))), [])
        if not found:
            wanted = "any layout" if layout is None else f"the layout {layout}"
            raise DataError(
                f"{shorten(folder)} holds no image pairs with flow in {wanted} of {', '.join(FLOW_LAYOUTS)}."
            )
        scenes += found
    return scenes


def _sintel(folder: Path) -> Iterator[FlowScene]:
    for place in (folder, folder / "training"):
        for kind in ("clean", "final"):
            for truth in files_below(place / "flow", "*/frame_*.flo"):
                scene, number = truth.parent.name, truth.stem.rsplit("_", 1)[1]
                if not (number.isascii() and number.isdecimal()):
                    continue
                following = f"frame_{int(number) + 1:0{len(number)}}.png"
                first, second = place / kind / scene / f"{truth.stem}.png", place / kind / scene / following
                if first.is_file() and second.is_file():
                    hidden, invalid = (
                        _existing(place / part / scene / first.name) for part in ("occlusions", "invalid")
                    )
                    yield FlowScene(f"{kind}/{scene}/{number}", first, second, truth, hidden, None, invalid)


def _chairs(folder: Path) -> Iterator[FlowScene]:
    for place in (folder, folder / "data"):
        for truth in _files(place, ".flo"):
            number = truth.stem.removesuffix("_flow")
            for suffix in (".ppm", ".png"):
                first, second = (place / f"{number}_img{image}{suffix}" for image in (1, 2))
                if first.is_file() and second.is_file():
                    yield FlowScene(number, first, second, truth)


def _kitti(folder: Path) -> Iterator[FlowScene]:
    for place in (folder, folder / "training"):
        for images in ("image_2", "colored_0", "image_0"):
            for truth in _files(place / "flow_occ", ".png"):
                first = place / images / truth.name
                second = first.with_name(truth.name.replace("_10.", "_11."))
                if second != first and first.is_file() and second.is_file():
                    shown = _existing(place / "flow_noc" / truth.name)
                    yield FlowScene(truth.stem, first, second, truth, shown=shown)


FLOW_LAYOUTS: dict[str, Callable[[Path], Iterator[FlowScene]]] = {"sintel": _sintel, "chairs": _chairs, "kitti": _kitti}


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _files(folder: Path, suffix: str) -> list[Path]:
    return list_images(folder, suffixes=(suffix,)).files if folder.is_dir() else []
