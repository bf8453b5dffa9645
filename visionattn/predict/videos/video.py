"""Convert videos with ffmpeg: one process per input decodes raw RGB frames, and another encodes the result."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import atomic_path
from visionattn.predict.videos.film import Colours, carried, colours_of, input_of, reason, shape_of, what_is_lost
from visionattn.predict.videos.matroska import frame_head, stream_head

__all__ = ["VIDEOS", "Video", "convert_videos", "probe", "upscale_video"]

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
MOST_PIXELS = 2**27  # per frame
NANO = 10**9
# Quality of the default encoder of each suffix; AVI has no timestamps, only a frame rate.
QUALITY = {".avi": ["-q:v", "2"]}


@dataclass(frozen=True)
class Video:
    """A video as decoded by ffmpeg, upright.

    Attributes:
        height: Rows of a frame.
        width: Columns of a frame.
        rate: Mean number of frames per second.
        frames: Number of frames; None if the file does not state it.
        tick: Resolution of the file's timestamps, in seconds.
        stream: ffprobe's description of the stream.
        streams: ffprobe's description of all streams.
        turned: Whether ffmpeg swaps height and width of frames.
    """

    height: int
    width: int
    rate: Fraction
    frames: int | None
    tick: Fraction = field(default=Fraction(1, 90000), compare=False)
    stream: dict[str, Any] = field(default_factory=dict, compare=False)
    streams: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    turned: bool = field(default=False, compare=False)

    @property
    def colours(self) -> Colours:
        """Interpretation of its values as colours."""
        return colours_of(self.stream, self.height, self.width)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"Video requires the program {name}, which is not on the PATH. Install ffmpeg (ffmpeg.org, or your "
            "system's package `ffmpeg`), or use images."
        )
    return path


def _every_frame() -> list[str]:
    """The option by which ffmpeg neither drops nor repeats frames; its name changed in version 5.1."""
    told = subprocess.run([_program("ffmpeg"), "-version"], capture_output=True, text=True).stdout
    version = re.match(r"ffmpeg version n?(\d+)\.(\d+)", told)
    is_old = version is not None and (int(version.group(1)), int(version.group(2))) < (5, 1)
    return ["-vsync", "0"] if is_old else ["-fps_mode", "passthrough"]


def probe(path: Path) -> Video:
    """Describe a file's first video stream that is not a cover image.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: The file is not a video, or is damaged.
    """
    command = [_program("ffprobe"), "-v", "error", "-show_streams", "-of", "json", *input_of(path)]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace")
    try:
        if found.returncode:
            raise ValueError(reason(found.stderr))
        streams = json.loads(found.stdout)["streams"]
        covers = [entry for entry in streams if entry.get("disposition", {}).get("attached_pic")]
        stream = next(s for s in streams if s.get("codec_type", "video") == "video" and s not in covers)
        rate = next(Fraction(stream[key]) for key in ("avg_frame_rate", "r_frame_rate") if stream[key] != "0/0")
        tick = Fraction(stream.get("time_base", "1/90000"))
        height, width = int(stream["height"]), int(stream["width"])
        if not 0 < height * width <= MOST_PIXELS or rate <= 0 or tick <= 0:
            raise ValueError(f"it has {width} x {height} pixels at {rate} frames per second")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, ZeroDivisionError) as error:
        told = str(error) if isinstance(error, ValueError) else "it has no video stream of known size and rate"
        raise DataError(f"{shorten(path)} is not a video that ffprobe can read: {shorten(told, 300)}.") from error
    # ffmpeg rotates frames upright, and ffprobe states their size before the rotation.
    turned = any(round(float(entry.get("rotation", 0))) % 180 for entry in stream.get("side_data_list", []))
    count = str(stream.get("nb_frames", ""))
    size = (width, height) if turned else (height, width)
    return Video(*size, rate, int(count) if count.isdigit() else None, tick, stream, tuple(streams), turned)


def upscale_video(
    source: Path,
    target: Path,
    enlarge: Callable[[np.ndarray], np.ndarray],
    scale: int,
    advance: Callable[[], None],
    expect: Callable[[int], None] = lambda steps: None,
) -> list[str]:
    """Upscale a video frame by frame; timestamps, sound, subtitles, colours and titles are kept.

    Args:
        source: The video.
        target: The result, in the container of its suffix with its default codec; written completely or not at all.
        enlarge: (H, W, 3) -> (r H, r W, 3) of uint8.
        scale: Factor r.
        advance: Called after each frame.
        expect: Called with the number of frames.

    Returns:
        Notes of what was lost.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: The file is not a video, or is damaged.
        StorageError: ffmpeg could not write the result.
    """
    video = probe(source)
    size = (scale * video.height, scale * video.width)
    return convert_videos([source], target, enlarge, size, advance, expect, video.colours)


def convert_videos(
    sources: Sequence[Path],
    target: Path,
    convert: Callable[..., np.ndarray | None],
    size: tuple[int, int],
    advance: Callable[[], None],
    expect: Callable[[int], None] = lambda steps: None,
    colours: Colours | None = None,
) -> list[str]:
    """Make a video from one or several that are read in step, with the timestamps and the sound of the first.

    Args:
        sources: The videos. The result ends with the shortest.
        target: The result, in the container of its suffix with its default codec; written completely or not at all.
        convert: Takes a frame (H, W, 3) of uint8 of each video and returns a frame of `size`, or None for no frame. The
            first frame that it returns has the timestamp of the first frame, and so on.
        size: Height and width of the result.
        advance: Called after each step.
        expect: Called with the number of steps.
        colours: Interpretation of the result's values as colours; None: BT.709, stated in the file.

    Returns:
        Notes of what was lost.

    Raises:
        InputError: ffmpeg is not installed.
        DataError: A file is not a video, or is damaged.
        StorageError: ffmpeg could not write the result.
    """
    videos = [probe(source) for source in sources]
    first = videos[0]
    ffmpeg = [_program("ffmpeg"), "-nostdin", "-v", "error"]
    whole = _every_frame()
    times = _times(ffmpeg, whole, sources[0], first)
    expect(len(times))
    readers = []
    for path, video in zip(sources, videos):
        # Another frame rate is converted to that of the first.
        rate = "" if video.rate == first.rate else f"fps={first.rate},"
        pixels = [*whole, "-vf", rate + video.colours.to_rgb(), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
        readers.append([*ffmpeg, *input_of(path), *_map(video), *pixels])
    streams, notes = carried(ffmpeg, sources[0], target, first.streams, first.stream)
    notes = list(dict.fromkeys(note for video in videos for note in what_is_lost(video.stream))) + notes
    even = tuple(side + side % 2 for side in size)
    if even != size:
        notes.append("its odd sides were made even by repeating the last row or column, as most codecs require")
    colours = Colours("bt709", {"colorspace": "bt709"}) if colours is None else colours
    written, tags = colours.from_rgb(*even)
    shape = shape_of(first.stream, first.turned)
    written += f",setsar={shape.numerator}/{shape.denominator}" if shape else ""
    writer = [*ffmpeg, "-protocol_whitelist", "file,pipe", "-itsoffset", f"{float(times[0][0]):.9f}"]
    writer += ["-f", "matroska", "-i", "pipe:0", *input_of(sources[0]), "-map", "0:v:0", *streams]
    writer += ["-map_metadata", "1", "-map_chapters", "1", *_titles(first.stream), "-vf", written, *tags]
    quality = QUALITY.get(target.suffix.lower())
    writer += quality or ["-crf", "17", *whole, "-enc_time_base:v", f"{first.tick.numerator}:{first.tick.denominator}"]
    with atomic_path(target) as temporary, ExitStack() as opened:
        logs = [opened.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(len(sources) + 1)]
        decoders = [
            subprocess.Popen(reader, stdout=subprocess.PIPE, stderr=log) for reader, log in zip(readers, logs[1:])
        ]
        encoder = subprocess.Popen([*writer, "-y", str(temporary)], stdin=subprocess.PIPE, stderr=logs[0])
        try:
            frames = [decoder.stdout for decoder in decoders]
            count = _pump(frames, encoder.stdin, videos, convert, advance, times, even)
            # With several videos, the longer ones end with a broken pipe, which is not a failure.
            failed = all([decoder.wait() for decoder in decoders]) or not count
            encoder_failed = encoder.wait()
        finally:
            for process in (*decoders, encoder):
                process.kill()
                process.wait()
        told = [_said(log) for log in logs]
        if encoder_failed:
            raise OSError(f"ffmpeg reports: {shorten(reason(told[0]), 400)}")
        complaints = "\n".join(told[1:])
        if failed:
            named = " and ".join(shorten(path) for path in sources)
            raise DataError(f"ffmpeg could not read {named} after {count} frames: {shorten(reason(complaints), 400)}")
        if len(sources) == 1 and complaints.strip():
            notes.append(f"ffmpeg reported a problem in the input: {shorten(reason(complaints), 300).rstrip('.')}")
    return notes


def _map(video: Video) -> list[str]:
    return ["-map", f"0:{video.stream.get('index', 'v:0')}"]


def _titles(stream: dict[str, Any]) -> list[str]:
    """Language and title of the video stream, which ffmpeg does not copy to the new stream."""
    tags = {key.lower(): value for key, value in stream.get("tags", {}).items()}
    return [x for key in ("language", "title") if key in tags for x in ("-metadata:s:v:0", f"{key}={tags[key]}")]


def _said(log: IO[str]) -> str:
    log.seek(0)
    return log.read(2**20)


def _times(ffmpeg: list[str], whole: list[str], source: Path, video: Video) -> list[tuple[Fraction, Fraction]]:
    """Timestamp and duration of each frame in seconds from the file's start, found by decoding the video once.

    Raises:
        DataError: There are no frames.
    """
    tick = f"{video.tick.numerator}:{video.tick.denominator}"
    command = [*ffmpeg, *input_of(source), *_map(video), *whole, "-enc_time_base", tick, "-f", "framecrc", "pipe:1"]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace")
    unit = video.tick
    stamps: list[int] = []
    last = 0
    for line in found.stdout.splitlines():
        if line.startswith("#tb 0: "):
            unit = Fraction(line.removeprefix("#tb 0: "))
        elif not line.startswith("#"):
            _, _, stamp, duration, *_ = line.split(",")
            # Frames of damaged files may be out of order; each gets its own timestamp.
            stamps.append(max(int(stamp), stamps[-1] + 1) if stamps else int(stamp))
            last = int(duration)
    if not stamps:
        told = shorten(reason(found.stderr), 400)
        raise DataError(f"ffmpeg could not read {shorten(source)} after 0 frames: {told}")
    usual = max(round(1 / (video.rate * unit)), 1)
    lengths = [after - before for before, after in pairwise(stamps)] + [last if last > 0 else usual]
    return [(stamp * unit, length * unit) for stamp, length in zip(stamps, lengths)]


def _pump(
    streams: Sequence[IO[bytes] | None],
    sink: IO[bytes] | None,
    videos: Sequence[Video],
    convert: Callable[..., np.ndarray | None],
    advance: Callable[[], None],
    times: Sequence[tuple[Fraction, Fraction]],
    size: tuple[int, ...],
) -> int:
    """Read, convert and write frames until a stream ends; return the number of steps."""
    assert sink is not None
    count = written = 0
    with ExitStack() as opened:
        opened.enter_context(suppress(BrokenPipeError))  # the encoder ended; its own message states why
        opened.enter_context(sink)
        sources = [opened.enter_context(stream) for stream in streams if stream is not None]
        sink.write(stream_head(size[0], size[1], round(NANO / videos[0].rate)))
        for frames in zip(*map(_frames, sources, videos)):
            result = convert(*frames)
            if result is not None:
                time, duration = times[min(written, len(times) - 1)]
                rest = [(0, wanted - side) for wanted, side in zip(size, result.shape)]
                result = np.pad(result, (*rest, (0, 0)), mode="edge") if any(more for _, more in rest) else result
                head = frame_head(round(NANO * (time - times[0][0])), round(NANO * duration), result.nbytes)
                sink.write(head)
                sink.write(result.tobytes())
                sink.flush()
                written += 1
            count += 1
            advance()
    return count


def _frames(stream: IO[bytes], video: Video) -> Iterator[np.ndarray]:
    """The frames, each (H, W, 3)."""
    size = video.height * video.width * 3
    while len(data := stream.read(size)) == size:
        yield np.frombuffer(data, np.uint8).reshape(video.height, video.width, 3).copy()
