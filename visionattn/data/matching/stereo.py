"""Folders of stereo pairs with ground-truth disparities, in the layouts of their datasets.

| layout | datasets | left, right | ground truth | non-occluded |
| --- | --- | --- | --- | --- |
| middlebury | Middlebury 2014, 2021 and evaluation 3, ETH3D | im0, im1 | disp0.pfm or disp0GT.pfm | mask0nocc.png |
| middlebury2006 | Middlebury 2005, 2006 | view1, view5 | disp1.png | by disp5.png |
| middlebury2003 | Middlebury 2003 | im2, im6 | disp2.png | by disp6.png |
| kitti2015 | KITTI 2015 | image_2/, image_3/ | disp_occ_0/ | disp_noc_0/ |
| kitti2012 | KITTI 2012 | colored_0/, colored_1/, or image_0/, image_1/ | disp_occ/ | disp_noc/ |
| pairs | your own | left, right | disp_left | nonocc.png, or by disp_right |
| sceneflow, fsd, booster, spring | | see `visionattn.data.matching.stereo_sets` | | |

KITTI's files are in one folder per kind, those of the others in one folder per scene. If the right ground truth
decides which pixels are non-occluded, it must be within a pixel of the left one at the match. PNGs hold the disparity
times a factor that the file does not state. It is given, for all scenes or for each; otherwise it is KITTI's 256 for
16 bits, and depends on the height in the two 8-bit layouts of Middlebury. A pair's notes say what was assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from visionattn.data.images import SUFFIXES, class_folders, list_images
from visionattn.data.matching.disparity import DISPARITY_FILES
from visionattn.data.matching.stereo_files import Scene, StereoPair, check_folder
from visionattn.data.matching.stereo_sets import SET_LAYOUTS
from visionattn.errors import ConfigError, DataError, shorten

__all__ = ["LAYOUTS", "Scene", "StereoPair", "find_scenes", "summarize", "with_factors"]

# Names without suffix: left, right, ground truths of the left view, ground truths of the right view.
SCENE_LAYOUTS = {
    "middlebury": ("im0", "im1", ("disp0", "disp0GT"), ("disp1", "disp1GT"), "mask0nocc"),
    "middlebury2006": ("view1", "view5", ("disp1",), ("disp5",), None),
    "middlebury2003": ("im2", "im6", ("disp2",), ("disp6",), None),
    "pairs": ("left", "right", ("disp_left",), ("disp_right",), "nonocc"),
}
# Folders: left, right, ground truth, ground truth of non-occluded pixels.
KITTI_LAYOUTS = {
    "kitti2015": [("image_2", "image_3", "disp_occ_0", "disp_noc_0")],
    "kitti2012": [("colored_0", "colored_1", "disp_occ", "disp_noc"), ("image_0", "image_1", "disp_occ", "disp_noc")],
}
# Factor of 8-bit files by image height: full, half, third and quarter size of 2003, 2005 and 2006; tsukuba of 2001.
FACTORS = {
    layout: {1500: 1.0, 750: 2.0, 375: 4.0, 1110: 1.0, 555: 2.0, 370: 3.0, 288: 16.0}
    for layout in ("middlebury2003", "middlebury2006")
}
LAYOUTS = (*SCENE_LAYOUTS, *KITTI_LAYOUTS, *SET_LAYOUTS)


def find_scenes(
    folders: str | Path | Iterable[str | Path],
    layout: str | None = None,
    factor: float | Mapping[str, float] | None = None,
) -> list[Scene]:
    """The scenes with ground truth in folders, sorted by name in each.

    Args:
        folders: Dataset folders (for KITTI, `training` or its parent), or a scene's folder.
        layout: One of `LAYOUTS`; None detects it.
        factor: Scale factor of 8- and 16-bit PNG disparities: one for all scenes, or one per scene name for some of
            them. None uses KITTI's 256 for 16 bits, and Middlebury's by height for 8 bits in the
            layouts middlebury2003 and middlebury2006; other 8-bit files have no default.

    Raises:
        ConfigError: The layout is unknown, a factor names no scene, or a factor is not above 0.
        DataError: A folder does not exist or holds no scene of a layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {shorten(layout)!r}.")
    scenes: list[Scene] = []
    for folder in map(check_folder, [folders] if isinstance(folders, (str, Path)) else folders):
        found: list[Scene] = []
        for name in LAYOUTS if layout is None else [layout]:
            if name in SET_LAYOUTS:
                found = list(SET_LAYOUTS[name](folder))
            else:
                found = _kitti(folder, name) if name in KITTI_LAYOUTS else _scenes(folder, name)
            if found:
                break
        else:
            wanted = "any layout" if layout is None else f"the layout {layout}"
            raise DataError(
                f"{shorten(folder)} holds no stereo pair with ground truth in {wanted} of {', '.join(LAYOUTS)}."
            )
        scenes += found
    names = {scene.name for scene in scenes}
    if isinstance(factor, Mapping) and (unknown := sorted(set(factor) - names)):
        raise ConfigError(
            f"There is a factor for {shorten(', '.join(unknown))}, but no such scene: there are "
            f"{shorten(', '.join(sorted(names)))}."
        )
    return with_factors(scenes, factor)


def with_factors(scenes: Iterable[Scene], factor: float | Mapping[str, float] | None) -> list[Scene]:
    """Set the factor of scenes, for all or by name; others keep theirs.

    Raises:
        ConfigError: A factor is not above 0.
    """
    by_name = factor if isinstance(factor, Mapping) else {}
    for value in by_name.values() if isinstance(factor, Mapping) else [factor]:
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"The factor of disparities must be a finite number above 0; got {value}.")
    common = None if isinstance(factor, Mapping) else factor
    return [replace(scene, factor=by_name.get(scene.name, common or scene.factor)) for scene in scenes]


def summarize(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Merge notes, pairs of a scene name and a note, into one line per distinct note."""
    scenes: dict[str, list[str]] = {}
    for name, note in notes:
        scenes.setdefault(note, []).append(name)
    return [f"{shorten(', '.join(names))}: {note}" for note, names in scenes.items()]


def _scenes(folder: Path, layout: str) -> list[Scene]:
    left, right, truths, right_truths, mask = SCENE_LAYOUTS[layout]
    found = []
    for place in [folder, *class_folders(folder).values()]:
        images = [_file(place, (name,), SUFFIXES) for name in (left, right)]
        truth = _file(place, truths, DISPARITY_FILES)
        if images[0] and images[1] and truth:
            right_truth = _file(place, right_truths, DISPARITY_FILES)
            nonocc = _file(place, (mask,), (".png",)) if mask else None
            name = place.resolve().name
            factors = FACTORS.get(layout, {})
            found.append(Scene(name, images[0], images[1], truth, right_truth, nonocc, factors=factors))
    return found


def _file(folder: Path, names: Iterable[str], suffixes: Iterable[str]) -> Path | None:
    paths = (folder / f"{name}{suffix}" for name in names for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


def _kitti(folder: Path, layout: str) -> list[Scene]:
    for place in (folder, folder / "training"):
        for folders in KITTI_LAYOUTS[layout]:
            left, right, truth, nonocc = (place / name for name in folders)
            if all(path.is_dir() for path in (left, right, truth)):
                files = list_images(truth, suffixes=(".png",)).files
                names = [path.name for path in files if (left / path.name).is_file()]
                return [
                    Scene(
                        Path(name).stem,
                        left / name,
                        right / name,
                        truth / name,
                        nonocc=nonocc / name if (nonocc / name).is_file() else None,
                    )
                    for name in names
                ]
    return []
