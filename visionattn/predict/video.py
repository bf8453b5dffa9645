"""Video through ffmpeg: raw RGB frames out of one process, upscaled, into another; sound is copied."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from visionattn.errors import DataError, InputError
from visionattn.files import atomic_path

__all__ = ["VIDEOS", "Video", "probe", "upscale_video"]

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True)
class Video:
    """A video's frames as ffmpeg gives them: upright, at a constant rate; their number where the file states it."""

    height: int
    width: int
    rate: Fraction
    frames: int | None


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"Video needs the program {name}, which is not on the PATH. Install ffmpeg (ffmpeg.org, or your system's "
            "package `ffmpeg`), or give single images."
        )
    return path


def probe(path: Path) -> Video:
    """What ffprobe says of a file's first video stream.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: The file is no video, or is damaged.
    """
    entries = "stream=width,height,avg_frame_rate,nb_frames:stream_side_data=rotation"
    command = [_program("ffprobe"), "-v", "error", "-select_streams", "v:0", "-show_entries", entries, "-of", "json"]
    found = subprocess.run([*command, str(path)], capture_output=True, text=True)
    try:
        if found.returncode:
            raise ValueError(_last_line(found.stderr))
        stream: dict[str, Any] = json.loads(found.stdout)["streams"][0]
        rate = Fraction(stream["avg_frame_rate"])
        height, width = int(stream["height"]), int(stream["width"])
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise DataError(f"{path} is not a video that ffprobe can read: {error}.") from error
    # ffmpeg turns frames upright, and ffprobe states their size before that.
    turned = any(round(float(entry.get("rotation", 0))) % 180 for entry in stream.get("side_data_list", []))
    count = str(stream.get("nb_frames", ""))
    size = (width, height) if turned else (height, width)
    return Video(*size, rate, int(count) if count.isdigit() else None)


def upscale_video(
    source: Path, target: Path, enlarge: Callable[[np.ndarray], np.ndarray], scale: int, advance: Callable[[], None]
) -> None:
    """Upscale frame by frame; rate and sound stay.

    Args:
        source: The video.
        target: The result, in the container of its suffix with that container's usual codec; whole or not at all.
        enlarge: (H, W, 3) -> (r H, r W, 3) of uint8.
        scale: r.
        advance: Called after each frame.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: The file is no video, or is damaged.
        StorageError: ffmpeg could not write the result.
    """
    video = probe(source)
    ffmpeg = [_program("ffmpeg"), "-nostdin", "-v", "error"]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    reader = [*ffmpeg, "-i", str(source), "-map", "0:v:0", "-vf", f"fps={video.rate}", *raw, "pipe:1"]
    size = f"{scale * video.width}x{scale * video.height}"
    writer = [*ffmpeg, *raw, "-s", size, "-r", str(video.rate), "-i", "pipe:0", "-i", str(source)]
    writer += ["-map", "0:v:0", "-map", "1:a?", "-c:a", "copy", "-crf", "17"]
    # Most codecs take even sides only; players take an HD picture without a stated matrix for BT.709.
    writer += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709,format=yuv420p"]
    writer += ["-colorspace", "bt709", "-y"]
    with atomic_path(target) as temporary, tempfile.TemporaryFile("w+") as complaints:
        decoder = subprocess.Popen(reader, stdout=subprocess.PIPE, stderr=complaints)
        encoder = subprocess.Popen([*writer, str(temporary)], stdin=subprocess.PIPE, stderr=complaints)
        try:
            count = _pump(decoder.stdout, encoder.stdin, video, enlarge, advance)
            failed = decoder.wait() or not count
            encoder_failed = encoder.wait()
        finally:
            for process in (decoder, encoder):
                process.kill()
                process.wait()
        complaints.seek(0)
        reason = _last_line(complaints.read())
        if encoder_failed:
            raise OSError(f"ffmpeg says: {reason}")
        if failed:
            raise DataError(f"ffmpeg could not read {source} after {count} frames: {reason}")


def _pump(
    frames: IO[bytes] | None,
    sink: IO[bytes] | None,
    video: Video,
    enlarge: Callable[[np.ndarray], np.ndarray],
    advance: Callable[[], None],
) -> int:
    """Read, upscale and write frames until there are none; returns how many."""
    assert frames is not None
    assert sink is not None
    count = 0
    shape = video.height, video.width, 3
    try:
        with frames, sink:
            while len(data := frames.read(video.height * video.width * 3)) == video.height * video.width * 3:
                sink.write(enlarge(np.frombuffer(data, np.uint8).reshape(shape).copy()).tobytes())
                sink.flush()
                count += 1
                advance()
    except BrokenPipeError:  # the encoder ended, and says why in its own words
        pass
    return count


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
