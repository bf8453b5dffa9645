"""Metadata of a video: colours, pixel aspect ratio, further streams; and the arguments of ffmpeg for them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

__all__ = ["Colours", "carried", "colours_of", "input_of", "reason", "what_is_lost"]

UNKNOWN = ("", "unknown", "unspecified", "reserved")
# ffprobe's names of matrices -> those of ffmpeg's scaler.
MATRICES = {"bt709": "bt709", "fcc": "fcc", "bt470bg": "bt470", "smpte170m": "smpte170m", "smpte240m": "smpte240m"}
MATRICES |= {"bt2020nc": "bt2020", "bt2020c": "bt2020"}
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# Codecs to which sound and subtitles are converted if a container does not support their own.
SOUND = {".webm": "libopus", ".avi": "libmp3lame", ".mkv": "flac"}
SUBTITLES = {".mp4": "mov_text", ".m4v": "mov_text", ".mov": "mov_text", ".webm": "webvtt", ".mkv": "srt"}
LENIENT = ["-strict", "-2"]  # allows formats that older versions call experimental, such as FLAC in MP4
# Lines of ffmpeg that state only that something failed.
EMPTY_WORDS = re.compile(r"Conversion failed|Error initializing output stream|Could not write header|Error while proc")


@dataclass(frozen=True)
class Colours:
    """Interpretation of a video's YUV values as colours.

    Attributes:
        matrix: Name of the matrix in ffmpeg's scaler; empty for RGB videos.
        tags: ffprobe's names of matrix, primaries, transfer and range, if the video states them.
        full: Whether values have the full range.
    """

    matrix: str
    tags: dict[str, str] = field(default_factory=dict)
    full: bool = False

    def to_rgb(self) -> str:
        """The filter that converts frames to RGB."""
        matrix = f"in_color_matrix={self.matrix}:in_range={'full' if self.full else 'limited'}:" if self.matrix else ""
        return f"scale={matrix}{EXACT},format=rgb24"

    def from_rgb(self, height: int, width: int) -> tuple[str, list[str]]:
        """The filter that converts RGB to YUV with the same matrix, and options for the encoder; see `colours_of`."""
        matrix = self.matrix or _usual(height, width)
        tags = dict(self.tags)
        if "colorspace" not in tags and matrix != _usual(height, width):
            tags["colorspace"] = next(name for name, own in MATRICES.items() if own == matrix)
        text = f"scale=out_color_matrix={matrix}:out_range={'full' if self.full else 'limited'}:{EXACT},format=yuv420p"
        stated = (f"{name}={tags.get(name, 'unknown')}" for name in ("colorspace", "color_primaries", "color_trc"))
        text += f",setparams={':'.join(stated)}"
        options = [part for option, value in tags.items() for part in (f"-{option}", value)]
        return text, [*options, "-color_range", "pc" if self.full else "tv"] if self.full or tags else options


def _usual(height: int, width: int) -> str:
    """The matrix that players assume for a video that states none."""
    return "bt709" if width >= 1280 or height > 576 else "smpte170m"


def colours_of(stream: dict[str, Any], height: int, width: int) -> Colours:
    """Colours of a video stream according to ffprobe.

    If a video states no matrix, the one that players assume for its size is used. The result is written with the same
    matrix, which is stated if players would assume another one for the new size, so that colours do not change.
    """
    names = {"colorspace": "color_space", "color_primaries": "color_primaries", "color_trc": "color_transfer"}
    stated = {option: str(stream.get(key, "")) for option, key in names.items()}
    tags = {option: value for option, value in stated.items() if value not in UNKNOWN and value != "gbr"}
    if tags.get("colorspace", "bt709") not in MATRICES:
        tags.pop("colorspace")
    is_rgb = stated["colorspace"] == "gbr" or str(stream.get("pix_fmt", "")).startswith(("rgb", "bgr", "gbr", "pal8"))
    full = stream.get("color_range") == "pc" or str(stream.get("pix_fmt", "")).startswith("yuvj")
    if is_rgb:
        return Colours("", tags)
    return Colours(MATRICES[tags["colorspace"]] if "colorspace" in tags else _usual(height, width), tags, full)


def what_is_lost(stream: dict[str, Any]) -> list[str]:
    """Notes of what frames of 8-bit RGB cannot represent."""
    pixels = str(stream.get("pix_fmt", ""))
    notes = []
    if depth := re.search(r"(9|10|12|14|16)(le|be)$", pixels) or re.match(r"p0(10|12|16)", pixels):
        notes.append(f"its {depth.group(1)} bits per channel became 8")
    if stream.get("color_transfer") in ("smpte2084", "arib-std-b67"):
        notes.append("it is HDR: its colour tags are kept, but not the metadata of its mastering display")
    side = {str(entry.get("side_data_type", "")) for entry in stream.get("side_data_list", [])}
    if found := sorted(name for name in side if name and not re.search("Display Matrix|CPB", name)):
        notes.append(f"left out: {', '.join(found).lower()}")
    if re.match(r"yuva|rgba|bgra|argb|abgr|gbrap|ya\d|rgba64|bgra64|pal8", pixels) or _tag(stream, "alpha_mode") == "1":
        notes.append("its alpha was left out")
    if stream.get("field_order") not in (None, "progressive", "unknown"):
        notes.append("it is interlaced, and frames were processed as a whole, with both fields")
    return notes


def _tag(stream: dict[str, Any], name: str) -> str | None:
    return {key.lower(): str(value) for key, value in stream.get("tags", {}).items()}.get(name)


def input_of(path: Path) -> list[str]:
    """Arguments of ffmpeg for an input file, which must not refer to another protocol or file."""
    return ["-protocol_whitelist", "file", "-i", os.path.abspath(path)]


def carried(
    ffmpeg: list[str], source: Path, target: Path, streams: Sequence[dict[str, Any]], taken: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Arguments of ffmpeg for further streams of the result and their codecs, and notes.

    Whether a container supports a stream is tested, since it depends on ffmpeg's version.

    Args:
        ffmpeg: The program.
        source: The video, ffmpeg's second input.
        target: The result.
        streams: ffprobe's description of each stream.
        taken: The video stream that is converted.
    """
    arguments: list[str] = []
    notes: list[str] = []
    count = 1  # number of output streams
    suffix = target.suffix.lower()
    for stream in streams:
        if stream is taken or stream.get("index") is None:
            continue
        kind, codec = str(stream.get("codec_type", "data")), str(stream.get("codec_name", "unknown"))
        other = {"audio": SOUND.get(suffix, "aac"), "subtitle": SUBTITLES.get(suffix)}.get(kind)
        candidates = [] if kind in ("video", "data") else ["copy", *([other] if other else [])]
        found = next((name for name in candidates if _fits(ffmpeg, source, stream, name, suffix)), None)
        name = {"audio": "sound", "subtitle": "subtitles", "video": "further video"}.get(kind, kind)
        if found is None:
            notes.append(f"its {name} ({codec}) was left out, which {suffix} does not support here")
            continue
        if found != "copy":
            notes.append(f"its {name} ({codec}) was converted to {found}, since {suffix} does not support it")
        arguments += ["-map", f"1:{stream['index']}", f"-c:{count}", found]
        count += 1
    return [*arguments, *LENIENT], notes


def _fits(ffmpeg: list[str], source: Path, stream: dict[str, Any], codec: str, suffix: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        trial = [*ffmpeg, *input_of(source), "-map", f"0:{stream['index']}", "-c", codec, *LENIENT, "-t", "1", "-y"]
        return not subprocess.run([*trial, str(Path(folder) / f"trial{suffix}")], capture_output=True).returncode


def shape_of(stream: dict[str, Any], turned: bool) -> Fraction | None:
    """Aspect ratio (width / height) of a pixel, upright; None if it is 1."""
    try:
        across, down = map(int, str(stream.get("sample_aspect_ratio", "1:1")).split(":"))
        shape = Fraction(across, down)
    except (ValueError, ZeroDivisionError):
        return None
    if shape <= 0 or shape == 1:
        return None
    return 1 / shape if turned else shape


def reason(complaints: str) -> str:
    """Error message of ffmpeg, without the lines that state only that something failed."""
    lines = [re.sub(r"^\[[^\]]* @ 0x[0-9a-f]+\] ", "", line).strip() for line in complaints.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line]
    telling = [line for line in lines if not EMPTY_WORDS.search(line)] or lines
    if not telling:
        return "it gave no reason"
    return telling[0] if len(telling) == 1 else f"{telling[0].rstrip('.')}; {telling[-1]}"
