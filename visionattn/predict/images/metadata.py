"""Metadata of image files: what describes the image, what can be written, and what is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["ICC", "ORIENTATION", "exif_of", "resolution", "tiff_resolution", "unkept"]

ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
TIFF_RESOLUTION = X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
XMP, IPTC, PHOTOSHOP, ICC = 700, 33723, 34377, 34675
# Tags about the structure of the file (size, strips, compression, resolution, tiles, palette, XMP, IPTC, ICC), which
# TIFF stores among its EXIF tags. Resolution is written from `dpi`.
STRUCTURE = {*range(254, 260), 262, 263, 266, 273, *range(277, 285), *range(288, 298), 301, *range(317, 346), 347}
STRUCTURE |= {*range(512, 533), XMP, IPTC, PHOTOSHOP, ICC}
MOST_DOTS = 65535  # maximum resolution of JPEG in dots per inch
IPTC_RESOURCE = 0x0404  # in Photoshop's block in JPEG


def exif_of(load: Callable[[], Image.Exif]) -> tuple[Image.Exif | None, list[str]]:
    """The EXIF tags that describe the image, without those about the file, and notes of what was lost.

    Tags that PIL reads but cannot write, such as fractions with denominator 0, are left out.

    Args:
        load: Returns the tags. It may raise any error, since they may be damaged.
    """
    try:
        exif = load()
        tags = {tag: value for tag, value in exif.items() if tag not in STRUCTURE and tag not in (EXIF_IFD, GPS_IFD)}
        parts = {ifd: dict(exif.get_ifd(ifd)) for ifd in (EXIF_IFD, GPS_IFD)}
    # PIL can raise any error for damaged EXIF tags.
    except Exception:
        return None, ["its EXIF tags are damaged, so that they were left out"]
    kept = Image.Exif()
    dropped = 0
    for tag, value in tags.items():
        if _writable(tag, value):
            kept[tag] = value
        else:
            dropped += 1
    for ifd, values in parts.items():
        good = {tag: value for tag, value in values.items() if _writable(tag, value)}
        dropped += len(values) - len(good)
        if good:
            # PIL's TIFF writer looks for the tag, and takes its values by `get_ifd`.
            kept.get_ifd(ifd).update(good)
            kept[ifd] = kept.get_ifd(ifd)
    notes = [f"{dropped} of its EXIF tags, which cannot be written again, were left out"] if dropped else []
    return kept if len(kept) else None, notes


def _writable(tag: int, value: Any) -> bool:
    trial = Image.Exif()
    trial[tag] = value
    try:
        trial.tobytes()
    # PIL can raise any error for values of a wrong type or range.
    except Exception:
        return False
    return True


def resolution(info: Mapping[Any, Any]) -> tuple[tuple[float, float] | None, list[str]]:
    """Horizontal and vertical resolution in dots per inch from PIL's `info`; with a note if it is not valid."""
    found = info.get("dpi")
    notes = []
    if found is None:
        density = info.get("jfif_density") if info.get("jfif_unit") == 0 else None
        across, down = info.get("aspect") or info.get("resolution") or density or (1, 1)
        if across != down:
            notes.append("its pixels are not square, which was left out")
        return None, notes
    try:
        dots = float(found[0]), float(found[1])
    except (TypeError, ValueError, ArithmeticError, LookupError):
        dots = (math.nan, math.nan)
    if all(0 < value <= MOST_DOTS for value in dots):  # false for NaN
        return dots, notes
    if dots != (0, 0):  # (0, 0) means unknown
        notes.append(
            f"its resolution is not a number above 0 and up to {MOST_DOTS} dots per inch, so that it was left out"
        )
    return None, notes


def tiff_resolution(tags: Mapping[int, Any]) -> dict[str, Any]:
    """The resolution that TIFF tags state, as PIL's `info`."""
    unit = {2: 1.0, 3: 2.54}.get(tags.get(RESOLUTION_UNIT, 2))
    if unit is None or X_RESOLUTION not in tags or Y_RESOLUTION not in tags:
        return {}
    try:
        return {"dpi": (unit * tags[X_RESOLUTION], unit * tags[Y_RESOLUTION])}
    except (TypeError, ArithmeticError):
        return {"dpi": (math.nan, math.nan)}


def unkept(path: Path, image: Image.Image, tags: Mapping[int, Any] | None = None) -> list[str]:
    """Content of the file that no output keeps.

    Args:
        path: The file.
        image: As PIL opened it.
        tags: Tags of a TIFF file.
    """
    found = []
    info = image.info
    tags = getattr(image, "tag_v2", {}) if tags is None else tags
    if info.get("xmp") or "XML:com.adobe.xmp" in info or XMP in tags:
        found.append("XMP")
    photoshop = info.get("photoshop")
    if (isinstance(photoshop, dict) and IPTC_RESOURCE in photoshop) or IPTC in tags:
        found.append("IPTC")
    if info.get("comment"):
        found.append("its comment")
    if image.format == "AVIF" and _is_deep_avif(path):
        found.append("more than 8 bits")
    return found


def _is_deep_avif(path: Path) -> bool:
    """Whether the codec configuration states 10 or 12 bits, which PIL reduces to 8."""
    with path.open("rb") as file:
        head = file.read(2**16)
    place = head.find(b"av1C")
    return 0 <= place < len(head) - 6 and bool(head[place + 6] & 0x40)
