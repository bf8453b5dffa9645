"""Metadata of PNG files: chunks that PIL does not return, and the transparent colour."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["KEPT", "Png", "chunk", "read_png", "with_alpha"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_SPACE = (b"gAMA", b"cHRM", b"cICP")
TEXT = (b"tEXt", b"zTXt", b"iTXt")
KEPT = (*COLOUR_SPACE, b"sRGB", *TEXT)
MASTERING = (b"mDCV", b"mDCv", b"cLLI", b"cLLi")
LONGEST = 2**24  # maximum size of a chunk in bytes
GREY, RGB = 0, 2  # colour types that can have a transparent colour


@dataclass
class Png:
    """A file's header and the chunks that are kept.

    Attributes:
        bits: Bits per sample.
        key: The transparent colour in the range of the samples, one value or three; empty if there is none.
        chunks: Names and contents to write into another PNG file.
        lost: Notes of what is not kept.
    """

    bits: int = 8
    key: tuple[int, ...] = ()
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def read_png(path: Path) -> Png:
    """Read the chunks of a PNG file, up to damage."""
    found = Png()
    kind = -1
    with path.open("rb") as file:
        if file.read(8) != SIGNATURE:
            return found
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name not in (b"IHDR", b"tRNS", *KEPT, *MASTERING) or length > LONGEST:
                file.seek(length + 4, 1)
                continue
            data = file.read(length)
            file.seek(4, 1)
            if name == b"IHDR" and length == 13:
                found.bits, kind = data[8], data[9]
            elif name == b"tRNS" and (kind, length) in ((GREY, 2), (RGB, 6)):
                found.key = tuple(value % 2**found.bits for value in struct.unpack(f">{length // 2}H", data))
            elif name in MASTERING:
                found.lost.append("the mastering data of its display")
            elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0"):
                found.lost.append("XMP")
            elif name in TEXT and data.startswith(b"Raw profile type "):
                found.lost.append("raw profiles")
            elif name in KEPT:
                found.chunks.append((name, data))
    return found


def with_alpha(pixels: np.ndarray, key: tuple[int, ...], bits: int) -> np.ndarray:
    """Add alpha to pixels (H, W, 1 or 3): 0 for pixels of the colour `key`, which has `bits` bits."""
    top = np.iinfo(pixels.dtype).max
    colour = np.array([round(value * top / (2**bits - 1)) for value in key])
    hidden = (pixels == colour).all(axis=2, keepdims=True)
    return np.concatenate([pixels, np.where(hidden, 0, top).astype(pixels.dtype)], axis=2)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk in its file format."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
