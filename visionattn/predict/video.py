"""Video through ffmpeg: raw RGB frames out of one process for each input, through a function, into another."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from visionattn.errors import DataError, InputError
from visionattn.files import atomic_path

__all__ = ["VIDEOS", "Video", "convert_videos", "probe", "upscale_video"]

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
    convert_videos([source], target, enlarge, (scale * video.height, scale * video.width), advance)


def convert_videos(
    sources: Sequence[Path],
    target: Path,
    convert: Callable[..., np.ndarray | None],
    size: tuple[int, int],
    advance: Callable[[], None],
) -> None:
    """Make a video of one or several that are read in step, at the rate and with the sound of the first.

    Args:
        sources: The videos. The result ends with the shortest.
        target: The result, in the container of its suffix with that container's usual codec; whole or not at all.
        convert: Takes a frame (H, W, 3) of uint8 of each video and gives a frame of `size`, or None for no frame.
        size: Height and width of the result.
        advance: Called after each step.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: A file is no video, or is damaged.
        StorageError: ffmpeg could not write the result.
    """
    videos = [probe(source) for source in sources]
    rate = videos[0].rate
    ffmpeg = [_program("ffmpeg"), "-nostdin", "-v", "error"]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    readers = [[*ffmpeg, "-i", str(path), "-map", "0:v:0", "-vf", f"fps={rate}", *raw, "pipe:1"] for path in sources]
    writer = [*ffmpeg, *raw, "-s", f"{size[1]}x{size[0]}", "-r", str(rate), "-i", "pipe:0", "-i", str(sources[0])]
    writer += ["-map", "0:v:0", "-map", "1:a?", "-c:a", "copy", "-crf", "17"]
    # Most codecs take even sides only; players take an HD picture without a stated matrix for BT.709.
    writer += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709,format=yuv420p"]
    writer += ["-colorspace", "bt709", "-y"]
    with atomic_path(target) as temporary, tempfile.TemporaryFile("w+") as complaints:
        decoders = [subprocess.Popen(reader, stdout=subprocess.PIPE, stderr=complaints) for reader in readers]
        encoder = subprocess.Popen([*writer, str(temporary)], stdin=subprocess.PIPE, stderr=complaints)
        try:
            count = _pump([decoder.stdout for decoder in decoders], encoder.stdin, videos, convert, advance)
            # Of several, the longer ones end with a broken pipe, which is no failure.
            failed = all([decoder.wait() for decoder in decoders]) or not count
            encoder_failed = encoder.wait()
        finally:
            for process in (*decoders, encoder):
                process.kill()
                process.wait()
        complaints.seek(0)
        reason = _last_line(complaints.read())
        if encoder_failed:
            raise OSError(f"ffmpeg says: {reason}")
        if failed:
            raise DataError(f"ffmpeg could not read {' and '.join(map(str, sources))} after {count} frames: {reason}")


def _pump(
    streams: Sequence[IO[bytes] | None],
    sink: IO[bytes] | None,
    videos: Sequence[Video],
    convert: Callable[..., np.ndarray | None],
    advance: Callable[[], None],
) -> int:
    """Read, convert and write frames until a stream ends; returns how many steps there were."""
    assert sink is not None
    count = 0
    with ExitStack() as opened:
        opened.enter_context(suppress(BrokenPipeError))  # the encoder ended, and says why in its own words
        opened.enter_context(sink)
        sources = [opened.enter_context(stream) for stream in streams if stream is not None]
        for frames in zip(*map(_frames, sources, videos)):
            result = convert(*frames)
            if result is not None:
                sink.write(result.tobytes())
                sink.flush()
            count += 1
            advance()
    return count


def _frames(stream: IO[bytes], video: Video) -> Iterator[np.ndarray]:
    """The frames, each (H, W, 3)."""
    size = video.height * video.width * 3
    while len(data := stream.read(size)) == size:
        yield np.frombuffer(data, np.uint8).reshape(video.height, video.width, 3).copy()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
