"""Image files in and out: 8 and 16 bit, grey, palette, alpha, with orientation, EXIF, ICC profile and resolution.

PIL reads and writes all but colour of 16 bits, which it would cut to 8: those pixels go through OpenCV (tifffile for
writing TIFF), and the rest of the file still through PIL.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.images import FORMATS, SUFFIXES
from visionattn.errors import DataError, InputError, VisionAttnError, require
from visionattn.files import atomic_path

__all__ = ["READABLE", "WRITABLE", "Picture", "check_size", "on_white", "read", "size_of", "write"]

WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}
WRITABLE |= {".tif": "TIFF", ".tiff": "TIFF"}
READABLE = SUFFIXES
LONGEST = {"JPEG": 65535, "WEBP": 16383}  # sides that the formats can state
OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_deflate"},
}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
EXIF_SIZE = {0xA002: 1, 0xA003: 0}  # tags of width and height, and the axes of an array that they state
# A file's own structure (size, strips, compression, resolution, tiles, palette, XMP, IPTC, ICC), which TIFF keeps among
# its EXIF tags. Resolution is written from `dpi`.
STRUCTURE = {*range(254, 260), 262, 263, 266, 273, *range(277, 285), *range(288, 298), 301, *range(317, 346), 347}
STRUCTURE |= {*range(512, 533), 700, 33723, 34377, 34675}
# Orientation -> whether to transpose, and which of the axes to turn over after that.
TURNS = {2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)), 5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1))}
TURNS[8] = (True, (0,))


@dataclass
class Picture:
    """Pixels, and what a file says beside them.

    Attributes:
        pixels: (H, W, C) of uint8 or uint16: grey, grey and alpha, RGB, or RGB and alpha.
        icc: The colour profile.
        exif: The EXIF tags, upright.
        dpi: Horizontal and vertical resolution.
        notes: What could not be kept, in words.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: Image.Exif | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Take the pixels of a PIL image; those of other modes become grey, RGB or RGBA.

        Raises:
            InputError: The mode has no known range (32-bit integers and floats).
        """
        icc, exif = image.info.get("icc_profile"), image.getexif()
        notes = []
        if image.mode in ("I", "F"):
            raise InputError("Its pixels are of 32 bits, whose range is unknown: save it with 8 or 16 bits.")
        if image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
        else:
            mode = image.mode
            if image.has_transparency_data:
                mode = "LA" if mode in ("1", "L", "LA", "La") else "RGBA"
            elif mode not in MODES.values():
                mode = "L" if mode == "1" else "RGB"
            if icc and image.mode not in ("1", "P", "PA", *MODES.values()):
                notes.append(f"its {image.mode} colours became RGB, so that their ICC profile was left out")
                icc = None
            pixels = np.asarray(image.convert(mode))
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return cls(pixels, icc, exif or None, image.info.get("dpi"), notes)

    def image(self) -> Image.Image:
        """A PIL image (8 bits, or grey of 16) with profile, EXIF and resolution as its `info`."""
        channels = self.pixels.shape[2]
        image = Image.fromarray(self.pixels[:, :, 0] if channels == 1 else self.pixels)
        image.info |= {"icc_profile": self.icc} if self.icc else {}
        image.info |= {"exif": self.exif.tobytes()} if self.exif else {}
        image.info |= {"dpi": self.dpi} if self.dpi else {}
        return image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        # Pictures of more than 89 megapixels are what this is for; of a bomb's size PIL still raises an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (VisionAttnError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        size = path.stat().st_size
        what = "it is empty" if size == 0 else f"it is none of {', '.join(FORMATS)}"
        raise DataError(f"{path} is not an image: {what}.") from error
    # Broken files make PIL raise nearly anything: OSError, SyntaxError, struct.error, ValueError.
    except Exception as error:
        raise DataError(f"Could not read the image {path}: {str(error).rstrip('.')}.") from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        DataError: There is no such file, or it is no image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read(path: Path) -> Picture:
    """Read an image file, upright.

    Raises:
        DataError: There is no such file, it is no image, or it is damaged.
        InputError: Its pixels have no known range.
        MissingPackageError: It is of 16-bit colour, and OpenCV is not installed.
    """
    with _opened(path) as image:
        # MPO is the JPEG of telephones, with a preview or a depth map behind it.
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        image.load()
        picture = Picture.of(image)
        if picture.pixels.shape[2] > 1 and _bits(path, image) == 16:
            picture.pixels = _read_16_bit(path)
    if frames > 1:
        picture.notes.append(f"only the first of its {frames} pages was taken")
    picture.exif = _described(picture.exif)
    if picture.exif is not None and ORIENTATION in picture.exif:
        transpose, axes = TURNS.get(picture.exif[ORIENTATION], (False, ()))
        if transpose:
            picture.pixels = picture.pixels.transpose(1, 0, 2)
            picture.dpi = picture.dpi and picture.dpi[::-1]
        picture.pixels = np.flip(picture.pixels, axes)
        picture.exif[ORIENTATION] = 1
    picture.pixels = np.ascontiguousarray(picture.pixels)
    return picture


def _bits(path: Path, image: Image.Image) -> int:
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # IHDR: signature 8, length 4, name 4, width 4, height 4, then the depth
    return max(getattr(image, "tag_v2", {}).get(258, (8,)))


def _read_16_bit(path: Path) -> np.ndarray:
    cv2: Any = require("cv2", "images")
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise DataError(f"Could not read the 16-bit image {path}: OpenCV does not know its layout.")
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]


def _described(exif: Image.Exif | None) -> Image.Exif | None:
    """The tags that describe the picture, without those of the file that it was in."""
    if exif is None:
        return None
    kept = Image.Exif()
    for tag, value in exif.items():
        if tag not in STRUCTURE and tag not in (EXIF_IFD, GPS_IFD):
            kept[tag] = value
    for ifd in (EXIF_IFD, GPS_IFD):
        if values := exif.get_ifd(ifd):
            # PIL's TIFF writer looks for the tag, and takes its values by `get_ifd`.
            kept.get_ifd(ifd).update(values)
            kept[ifd] = kept.get_ifd(ifd)
    return kept if len(kept) else None


def check_size(path: Path, height: int, width: int) -> None:
    """Raise `InputError` for a result that the format of `path` cannot hold, before it is computed."""
    longest = LONGEST.get(WRITABLE[path.suffix.lower()])
    if longest and max(height, width) > longest:
        raise InputError(
            f"The result is {height} x {width} pixels, and {WRITABLE[path.suffix.lower()]} ends at {longest} a side: "
            "write PNG or TIFF."
        )


def write(path: Path, picture: Picture) -> None:
    """Write an image file in the format of its suffix, whole or not at all; `picture.notes` gains what was lost.

    JPEG and WebP hold 8 bits, and JPEG no alpha: such pixels are reduced, or laid on white.

    Raises:
        InputError: The format cannot hold the size.
        StorageError: The file could not be written.
        MissingPackageError: It is of 16-bit colour, and OpenCV or tifffile is not installed.
    """
    form = WRITABLE[path.suffix.lower()]
    height, width, channels = picture.pixels.shape
    check_size(path, height, width)
    if picture.exif is not None and EXIF_IFD in picture.exif:
        values = picture.exif.get_ifd(EXIF_IFD)
        values.update({tag: picture.pixels.shape[axis] for tag, axis in EXIF_SIZE.items() if tag in values})
    if form in ("JPEG", "WEBP") and picture.pixels.dtype == np.uint16:
        picture.notes.append(f"{form} holds 8 bits, so that 16 were reduced")
        picture.pixels = np.rint(picture.pixels / np.float32(257)).astype(np.uint8)
    if form == "JPEG" and channels in (2, 4):
        picture.notes.append("JPEG holds no alpha, so that the picture was laid on white")
        picture.pixels = on_white(picture.pixels)
    with atomic_path(path) as temporary:
        if picture.pixels.dtype == np.uint16 and picture.pixels.shape[2] > 1:
            (_write_png_16 if form == "PNG" else _write_tiff_16)(temporary, picture)
        else:
            _write_pil(temporary, form, picture)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Lay uint8 colours with alpha (H, W, C + 1) on white: (H, W, C)."""
    alpha = pixels[..., -1:] / np.float32(255)
    return np.rint(pixels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _write_pil(path: Path, form: str, picture: Picture) -> None:
    options = dict(OPTIONS[form])
    if picture.icc:
        options["icc_profile"] = picture.icc
    if picture.exif is not None:
        options["exif"] = picture.exif
        if form == "TIFF" and {EXIF_IFD, GPS_IFD} & set(picture.exif):
            # libtiff, which compresses, cannot be given these; PIL's own writer does not compress.
            options.pop("compression")
    if picture.dpi:
        options["dpi"] = picture.dpi
    Picture(picture.pixels).image().save(path, form, **options)


def _write_png_16(path: Path, picture: Picture) -> None:
    cv2: Any = require("cv2", "images")
    pixels = picture.pixels
    order = {2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, order]))
    if not done:
        raise OSError("OpenCV could not encode it")
    encoded = data.tobytes()
    chunks = b""
    if picture.icc:
        chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.dpi:
        chunks += _chunk(b"pHYs", struct.pack(">IIB", *(round(float(dots) / 0.0254) for dots in picture.dpi), 1))
    if picture.exif is not None:
        chunks += _chunk(b"eXIf", picture.exif.tobytes().removeprefix(b"Exif\0\0"))
    head = 33  # signature and IHDR, which come first
    path.write_bytes(b"".join((encoded[:head], chunks, encoded[head:])))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _write_tiff_16(path: Path, picture: Picture) -> None:
    tifffile: Any = require("tifffile", "images")
    pixels = picture.pixels
    if pixels.shape[2] == 2:  # PIL opens no TIFF of grey with alpha in 16 bits
        pixels = pixels[:, :, [0, 0, 0, 1]]
    if picture.exif is not None:
        picture.notes.append("the EXIF tags were left out: 16-bit colour TIFF keeps the ICC profile and the resolution")
    tifffile.imwrite(
        path,
        pixels,
        photometric="rgb",
        extrasamples=["unassalpha"] if pixels.shape[2] == 4 else None,
        compression="zlib",
        predictor=True,
        iccprofile=picture.icc,
        resolution=tuple(float(dots) for dots in picture.dpi) if picture.dpi else None,
        resolutionunit=2 if picture.dpi else None,
        metadata=None,
    )
