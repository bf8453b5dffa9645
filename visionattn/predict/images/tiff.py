"""TIFF layouts that PIL reads incorrectly or not at all: 16-bit colour, separate planes with alpha, white is zero.

PIL reduces 16-bit colour to 8 bits, and OpenCV confuses separate planes; tifffile returns the samples as stored, and
this module interprets them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from visionattn.errors import DataError, InputError, require, shorten
from visionattn.predict.images.metadata import ICC, IPTC, TIFF_RESOLUTION, XMP

__all__ = ["Layout", "read_layout", "read_samples"]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, PLANES, INKS, EXTRA, FORMAT = 256, 257, 258, 262, 277, 284, 332, 338, 339
DESCRIBING = (*TIFF_RESOLUTION, XMP, IPTC, ICC)
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}  # photometric interpretation -> number of colour samples
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK = COLOURS
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha, premultiplied or not, among extra samples


@dataclass(frozen=True)
class Layout:
    """How a TIFF file stores its first image.

    Attributes:
        height: Rows.
        width: Columns.
        bits: Largest number of bits per sample.
        photometric: Photometric interpretation of the samples.
        stated: Whether the file states it; otherwise it is "black is zero" or RGB, as in libtiff.
        samples: Number of samples per pixel.
        separate: Whether each sample has its own plane.
        extra: Meaning of each sample beyond the colours.
        format: Sample format; 1: unsigned integers.
        inks: Ink set; 1: CMYK.
        described: Tags of resolution, ICC profile, XMP and IPTC.
    """

    height: int
    width: int
    bits: int
    photometric: int
    stated: bool
    samples: int
    separate: bool
    extra: tuple[int, ...]
    format: int
    inks: int
    described: dict[int, Any]

    @property
    def beyond_pil(self) -> bool:
        """Whether this module must read it, since PIL does not read it correctly."""
        if self.bits > 8:
            return self.samples > 1 or self.photometric != BLACK_IS_ZERO or not self.stated
        return self.bits == 8 and (not self.stated or (self.separate and bool(self.extra)))


def read_layout(path: Path) -> Layout | None:
    """The layout of a file, from its tags; None if it is not a TIFF file.

    Raises:
        DataError: The tags are damaged.
    """
    with path.open("rb") as file:
        head = file.read(16)
        if head[:4] not in MAGIC:
            return None
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[2] == 43 or head[3] == 43 else head[:8])
            file.seek(tags.next)
            tags.load(file)

            def values(tag: int, default: int) -> tuple[int, ...]:
                found = tags.get(tag, default)
                return tuple(map(int, found)) if isinstance(found, tuple) else (int(found),)

            samples = values(SAMPLES, 1)[0]
            return Layout(
                int(tags[HEIGHT]),
                int(tags[WIDTH]),
                max(values(BITS, 1)),
                values(PHOTOMETRIC, BLACK_IS_ZERO if samples < 3 else RGB)[0],
                PHOTOMETRIC in tags,
                samples,
                values(PLANES, 1)[0] == 2,
                values(EXTRA, 0) if EXTRA in tags else (),
                max(values(FORMAT, 1)),
                values(INKS, 1)[0],
                {tag: tags[tag] for tag in DESCRIBING if tag in tags},
            )
        # PIL can raise any error for damaged tags.
        except Exception as error:
            raise DataError(f"Could not read the image {shorten(path)}: its TIFF tags are damaged.") from error


def read_samples(path: Path, layout: Layout) -> tuple[np.ndarray, list[str]]:
    """The pixels of the first image as grey or RGB, with alpha if the file states it: (H, W, C) in 1 to 4 channels.

    Returns:
        The pixels, uint8 or uint16, and notes of what was left out.

    Raises:
        InputError: The samples have no known range or meaning.
        DataError: The file is damaged, too large, or has an unsupported compression.
        MissingPackageError: tifffile is not installed.
    """
    colours = COLOURS.get(layout.photometric, 0)
    if layout.format != 1 or layout.bits not in (8, 16):
        raise InputError(
            f"Its samples have {layout.bits} bits{'' if layout.format == 1 else ', signed or floats'}, whose range is "
            "unknown: save it with 8 or 16 bits, unsigned."
        )
    if not colours or layout.samples < colours or (layout.photometric == CMYK and layout.inks != 1):
        raise InputError(
            f"Its photometric interpretation {layout.photometric} with {layout.samples} samples of {layout.bits} bits "
            "is not supported: save it as RGB."
        )
    if layout.height * layout.width > 2 * (Image.MAX_IMAGE_PIXELS or 2**28):
        raise DataError(f"Could not read the image {shorten(path)}: {layout.height} x {layout.width} is too large.")
    samples, colour_map = _stored(path, layout)
    top = np.iinfo(samples.dtype).max
    colour = samples[..., :colours]
    notes = [] if layout.stated else ["it does not state its photometric interpretation (tag 262): assumed the default"]
    if layout.photometric == WHITE_IS_ZERO:
        colour = top - colour
    elif layout.photometric == PALETTE:
        colour = colour_map.T[colour[..., 0]]
        colour = (colour // 257).astype(np.uint8) if layout.bits == 8 else colour.astype(np.uint16)
    elif layout.photometric == CMYK:
        light = (top - colour).astype(np.float32)
        colour = np.rint(light[..., :3] * (light[..., 3:] / top)).astype(samples.dtype)
    extra = (*layout.extra, *[0] * layout.samples)[: layout.samples - colours]
    if not extra or extra[0] not in (ASSOCIATED, UNASSOCIATED):
        if extra:
            notes.append(f"{len(extra)} of its channels, which are not stated to be alpha, were left out")
        return colour, notes
    if len(extra) > 1:
        notes.append(f"{len(extra) - 1} of its channels beyond alpha were left out")
    alpha = samples[..., colours : colours + 1]
    if extra[0] == ASSOCIATED:
        opaque = np.maximum(alpha, 1).astype(np.float64)
        colour = np.rint(np.minimum(colour / opaque, 1) * top).astype(colour.dtype)
    return np.concatenate([colour, alpha], axis=2), notes


def _stored(path: Path, layout: Layout) -> tuple[np.ndarray, Any]:
    """Samples (H, W, S) as stored, and the colour map."""
    tifffile: Any = require("tifffile", "images")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # the problems that it logs are raised as well
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            samples = page.asarray()
            colour_map = page.colormap
    except MemoryError:
        raise
    # tifffile can raise any error for damaged files.
    except Exception as error:
        if "imagecodecs" not in str(error):
            raise DataError(f"Could not read the image {shorten(path)}: {shorten(error).rstrip('.')}.") from error
        return _by_opencv(path, layout), None
    if layout.separate and layout.samples > 1:
        samples = np.moveaxis(samples, 0, -1)
    return samples.reshape(layout.height, layout.width, layout.samples), colour_map


def _by_opencv(path: Path, layout: Layout) -> np.ndarray:
    """Read a file whose compression tifffile does not support itself, if OpenCV reads it correctly."""
    cv2: Any = require("cv2", "images")
    if layout.photometric == RGB and not layout.separate and layout.samples in (3, 4):
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is not None and pixels.shape == (layout.height, layout.width, layout.samples):
            return pixels[:, :, [2, 1, 0, 3][: layout.samples]]
    raise DataError(
        f"Could not read the image {shorten(path)}: its compression is not supported in this layout. Save it without "
        "compression, or install the package imagecodecs."
    )
