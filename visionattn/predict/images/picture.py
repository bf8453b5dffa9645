"""Read and write image files: 8 and 16 bit, grey, palette, alpha, with orientation, EXIF, ICC profile and resolution.

PIL reads and writes everything except 16-bit colour, which it would reduce to 8 bits: such pixels are read and written
by OpenCV (PNG) and tifffile (TIFF), and the rest of the file by PIL.
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
from PIL import Image, PngImagePlugin

from visionattn.data.images import FORMATS, SUFFIXES
from visionattn.errors import DataError, InputError, VisionAttnError, require, shorten
from visionattn.files import atomic_path
from visionattn.predict.images.metadata import (
    EXIF_IFD,
    GPS_IFD,
    ICC,
    ORIENTATION,
    exif_of,
    resolution,
    tiff_resolution,
    unkept,
)
from visionattn.predict.images.png import COLOUR_SPACE, TEXT, Png, chunk, read_png, with_alpha
from visionattn.predict.images.tiff import CMYK, Layout, read_layout, read_samples

__all__ = ["READABLE", "WRITABLE", "Picture", "check_size", "on_white", "read", "size_of", "write"]

WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}
WRITABLE |= {".tif": "TIFF", ".tiff": "TIFF"}
READABLE = SUFFIXES
LONGEST = {"JPEG": 65535, "WEBP": 16383}  # maximum side of the formats
OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_deflate"},
}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
EXIF_SIZE = {0xA002: 1, 0xA003: 0}  # tags of width and height, and the corresponding axes of an array
OPTIONAL = {"exif": "EXIF", "dpi": "resolution", "icc_profile": "ICC profile", "pnginfo": "text"}
# Errors that writers raise for metadata that they cannot write.
UNWRITABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SyntaxError,
    struct.error,
)
# Orientation -> whether to transpose, and which of the axes to flip afterwards.
TURNS = {2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)), 5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1))}
TURNS[8] = (True, (0,))


@dataclass
class Picture:
    """Pixels of an image and the metadata of its file.

    Attributes:
        pixels: (H, W, C) of uint8 or uint16: grey, grey and alpha, RGB, or RGB and alpha.
        icc: The colour profile.
        exif: The EXIF tags, for upright orientation.
        dpi: Horizontal and vertical resolution.
        notes: Notes of what could not be kept.
        chunks: Names and contents of PNG chunks of text and colour space.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: Image.Exif | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Create a picture from a PIL image; other modes are converted to grey, RGB or RGBA.

        Raises:
            InputError: The mode has no known range (32-bit integers and floats).
        """
        icc = image.info.get("icc_profile")
        exif, notes = exif_of(image.getexif)
        dpi, unknown = resolution(image.info)
        notes += unknown
        if image.mode in ("I", "F"):
            raise InputError("Its pixels have 32 bits, whose range is unknown: save it with 8 or 16 bits.")
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
        return cls(pixels, icc, exif, dpi, notes)

    def image(self) -> Image.Image:
        """A PIL image (8 bits, or grey of 16) with profile, EXIF and resolution as its `info`."""
        channels = self.pixels.shape[2]
        image = Image.fromarray(self.pixels[:, :, 0] if channels == 1 else self.pixels)
        image.info |= {"icc_profile": self.icc} if self.icc else {}
        image.info |= {"exif": self.exif.tobytes()} if self.exif else {}
        image.info |= {"dpi": self.dpi} if self.dpi else {}
        return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert any error of a reader into a one-line message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError as error:
        raise InputError(f"{shorten(path)}: {error}") from error
    except (VisionAttnError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        size = path.stat().st_size
        what = "it is empty" if size == 0 else f"it is none of {', '.join(FORMATS)}, or damaged"
        raise DataError(f"{shorten(path)} is not an image: {what}.") from error
    # PIL can raise any error for damaged files: OSError, SyntaxError, struct.error, ValueError.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"Could not read the image {shorten(path)}: {shorten(reason).rstrip('.')}.") from error


def _check_regular(path: Path) -> None:
    """Raise `DataError` for a path that is not a file: reading a pipe would wait forever."""
    if path.exists() and not path.is_file():
        raise DataError(f"Could not read the image {shorten(path)}: it is not a regular file.")


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        DataError: The file does not exist, or is not an image.
    """
    with _reading(path):
        _check_regular(path)
        layout = read_layout(path)
        if layout is not None and layout.beyond_pil:
            return layout.height, layout.width
        # Images of more than 89 megapixels are allowed; PIL still raises an error for decompression bombs.
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width


def read(path: Path) -> Picture:
    """Read an image file, upright: the first frame of an animation, the first page of a TIFF file.

    Raises:
        DataError: The file does not exist, is not an image, or is damaged.
        InputError: Its pixels have no known range.
        MissingPackageError: It has 16-bit colour, and OpenCV or tifffile is not installed.
    """
    with _reading(path):
        _check_regular(path)
        layout = read_layout(path)
        if layout is not None and layout.beyond_pil:
            picture = _read_tiff(path, layout)
        else:
            with Image.open(path, formats=FORMATS) as image:
                picture = _read_by_pil(path, image, layout)
    if picture.exif is not None and ORIENTATION in picture.exif:
        transpose, axes = TURNS.get(picture.exif[ORIENTATION], (False, ()))
        if transpose:
            picture.pixels = picture.pixels.transpose(1, 0, 2)
            picture.dpi = picture.dpi and picture.dpi[::-1]
        picture.pixels = np.flip(picture.pixels, axes)
        picture.exif[ORIENTATION] = 1
    picture.pixels = np.ascontiguousarray(picture.pixels)
    return picture


def _read_by_pil(path: Path, image: Image.Image, layout: Layout | None) -> Picture:
    frames = getattr(image, "n_frames", 1)
    image.load()
    picture = Picture.of(image)
    png = read_png(path) if image.format == "PNG" else Png()
    if png.bits == 16 and picture.pixels.shape[2] > 1:
        picture.pixels = _read_png_16(path)
    if png.key:
        picture.pixels = with_alpha(picture.pixels[:, :, : len(png.key)], png.key, png.bits)
    if layout is not None and layout.bits == 12:  # PIL does not scale them from 0..4095
        picture.pixels = np.rint(picture.pixels * np.float32(65535 / 4095)).astype(np.uint16)
    if frames > 1:
        # MPO is a JPEG from a phone, followed by a preview or a depth map.
        kind = {"TIFF": "pages", "MPO": "images"}.get(image.format or "", "frames")
        picture.notes.append(f"only the first of its {frames} {kind} was used")
    picture.chunks = png.chunks
    if lost := dict.fromkeys([*png.lost, *unkept(path, image)]):
        picture.notes.append(f"left out: {', '.join(lost)}")
    return picture


def _read_tiff(path: Path, layout: Layout) -> Picture:
    pixels, notes = read_samples(path, layout)
    with path.open("rb") as file:

        def load() -> Image.Exif:
            tags = Image.Exif()
            tags.load_from_fp(file)
            return tags

        exif, lost = exif_of(load)
    dpi, unknown = resolution(tiff_resolution(layout.described))
    icc = layout.described.get(ICC)
    if left_out := unkept(path, Image.new("1", (1, 1)), layout.described):
        lost.append(f"left out: {', '.join(left_out)}")
    if layout.photometric == CMYK and icc:
        notes.append("its CMYK colours became RGB, so that their ICC profile was left out")
        icc = None
    return Picture(pixels, icc, exif, dpi, notes + lost + unknown)


def _read_png_16(path: Path) -> np.ndarray:
    cv2: Any = require("cv2", "images")
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise DataError(f"Could not read the 16-bit image {shorten(path)}: OpenCV does not support its layout.")
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]


def check_size(path: Path, height: int, width: int) -> None:
    """Raise `InputError` for a result that is too large for the format of `path`, before it is computed."""
    longest = LONGEST.get(WRITABLE[path.suffix.lower()])
    if longest and max(height, width) > longest:
        raise InputError(
            f"The result has {height} x {width} pixels; {WRITABLE[path.suffix.lower()]} supports at most {longest} per "
            "side: write PNG or TIFF."
        )


def write(path: Path, picture: Picture, quality: int | None = None) -> None:
    """Write an image file in the format of its suffix, completely or not at all; `picture.notes` gets what was lost.

    JPEG and WebP store 8 bits, and JPEG has no alpha: pixels are reduced, or composited on white.

    Args:
        path: The file.
        picture: The image.
        quality: Quality of JPEG and WebP, 1 to 100; None: 95.

    Raises:
        InputError: The image is too large for the format.
        StorageError: The file could not be written.
        MissingPackageError: It has 16-bit colour, and OpenCV or tifffile is not installed.
    """
    form = WRITABLE[path.suffix.lower()]
    height, width, channels = picture.pixels.shape
    check_size(path, height, width)
    if picture.exif is not None and EXIF_IFD in picture.exif:
        values = picture.exif.get_ifd(EXIF_IFD)
        values.update({tag: picture.pixels.shape[axis] for tag, axis in EXIF_SIZE.items() if tag in values})
    if form in ("JPEG", "WEBP") and picture.pixels.dtype == np.uint16:
        picture.notes.append(f"{form} stores 8 bits, so that 16 bits were reduced")
        picture.pixels = np.rint(picture.pixels / np.float32(257)).astype(np.uint8)
    if form == "JPEG" and channels in (2, 4):
        picture.notes.append("JPEG has no alpha, so that the image was composited on white")
        picture.pixels = on_white(picture.pixels)
    if quality is not None and "quality" not in OPTIONS[form]:
        picture.notes.append(f"{form} is lossless, so that the quality, which applies to JPEG and WebP, was ignored")
        quality = None
    if form != "PNG" and picture.chunks:
        names = {name for name, _ in picture.chunks}
        if names & set(TEXT):
            picture.notes.append(f"{form} files keep no PNG text, so that it was left out")
        if space := [name.decode() for name in COLOUR_SPACE if name in names and not picture.icc]:
            picture.notes.append(f"its colour space ({', '.join(space)}), which only PNG can store, was left out")
    with atomic_path(path) as temporary:
        if picture.pixels.dtype == np.uint16 and picture.pixels.shape[2] > 1:
            (_write_png_16 if form == "PNG" else _write_tiff_16)(temporary, picture)
        else:
            _write_pil(temporary, form, picture, quality)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Composite uint8 colours with alpha (H, W, C + 1) on white: (H, W, C)."""
    alpha = pixels[..., -1:] / np.float32(255)
    return np.rint(pixels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _write_pil(path: Path, form: str, picture: Picture, quality: int | None) -> None:
    options = OPTIONS[form] | ({} if quality is None else {"quality": quality})
    if picture.icc:
        options["icc_profile"] = picture.icc
    if picture.exif is not None:
        options["exif"] = picture.exif
        if form == "TIFF" and {EXIF_IFD, GPS_IFD} & set(picture.exif):
            # libtiff, which compresses, does not accept these; PIL's own writer does not compress.
            options.pop("compression")
    if picture.dpi:
        options["dpi"] = picture.dpi
    if form == "PNG" and picture.chunks:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, data in picture.chunks:
            options["pnginfo"].add(name, data)
    image = Picture(picture.pixels).image()
    # Metadata that a format cannot store must not prevent writing the image.
    for key, what in OPTIONAL.items():
        try:
            image.save(path, form, **options)
            return
        except UNWRITABLE:
            if options.pop(key, None) is not None:
                picture.notes.append(f"its {what} cannot be written into {form}, so that it was left out")
    image.save(path, form, **options)


def _write_png_16(path: Path, picture: Picture) -> None:
    cv2: Any = require("cv2", "images")
    pixels = picture.pixels
    order = {2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, order]))
    if not done:
        raise OSError("OpenCV could not encode it")
    encoded = data.tobytes()
    chunks = b""
    for name, data in picture.chunks:
        chunks += chunk(name, data)
    if picture.icc:
        chunks += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.dpi:
        chunks += chunk(
            b"pHYs", struct.pack(">IIB", *(min(round(dots / 0.0254), 2**32 - 1) for dots in picture.dpi), 1)
        )
    if picture.exif is not None:
        chunks += chunk(b"eXIf", picture.exif.tobytes().removeprefix(b"Exif\0\0"))
    head = 33  # signature and IHDR, which come first
    path.write_bytes(b"".join((encoded[:head], chunks, encoded[head:])))


def _write_tiff_16(path: Path, picture: Picture) -> None:
    tifffile: Any = require("tifffile", "images")
    pixels = picture.pixels
    if pixels.shape[2] == 2:  # PIL cannot open a 16-bit TIFF of grey with alpha
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
        resolution=picture.dpi,
        resolutionunit=2 if picture.dpi else None,
        metadata=None,
    )
