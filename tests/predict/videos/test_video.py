"""Video: by ffmpeg itself where it is installed, and with stand-ins that speak its command lines for its failures."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from tests.predict.upscalers import picture, repeated
from visionattn.errors import DataError, InputError, StorageError
from visionattn.predict.videos.film import colours_of, reason, what_is_lost
from visionattn.predict.videos.video import Video, convert_videos, probe, upscale_video

needs_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg: `make ffmpeg` installs it"
)

# The stand-in's video is raw RGB. It notes the arguments that it was called with, for the tests to look at.
FFMPEG = """
import json, os, sys
arguments = sys.argv[1:]
if arguments == ["-version"]:
    sys.exit(print("ffmpeg version 4.4.2-0ubuntu0"))
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(arguments) + "\\n")
source, target = arguments[arguments.index("-i") + 1], arguments[-1]
mode = os.environ.get("MODE", "")
if "framecrc" in arguments:
    print("#tb 0: 1001/30000")
    for number in range(os.path.getsize(source) // 1800):
        print(f"0, {number}, {number + 7}, 1, 1800, 0x0")
    print("moov atom not found", file=sys.stderr)
elif target == "pipe:1":
    sys.stdout.buffer.write(open(source, "rb").read())
    if mode == "bad input":
        sys.exit("moov atom not found")
elif mode == "full disk":
    sys.exit("[mp4 @ 0x55d] No space left on device\\nConversion failed!")
else:
    open(target, "wb").write(sys.stdin.buffer.read())
"""
FFPROBE = """
import os, sys
print(os.environ["ANSWER"])
"""


def stream_of(path):
    """Frames of the stream that the encoder was given, with their times and durations in nanoseconds."""
    data = path.read_bytes()
    found = []

    def walk(start, end):
        while start < end:
            length = 9 - data[start].bit_length()  # of the element's name
            name, start = data[start : start + length], start + length
            size = int.from_bytes(data[start + 1 : start + 8], "big")
            start += 8
            stop = end if size == 2**56 - 1 else start + size
            if name in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xa0"):
                walk(start, stop)
            elif name == b"\xe7":
                found.append([int.from_bytes(data[start:stop], "big"), 0, None])
            elif name == b"\x9b":
                found[-1][1] = int.from_bytes(data[start:stop], "big")
            elif name == b"\xa1":
                found[-1][2] = np.frombuffer(data[start + 4 : stop], np.uint8)
            start = stop

    walk(0, len(data))
    return found


@pytest.fixture
def tools(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in (("ffmpeg", FFMPEG), ("ffprobe", FFPROBE)):
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    stream = {"width": 30, "height": 20, "avg_frame_rate": "30000/1001", "nb_frames": "3"}
    monkeypatch.setenv("ANSWER", json.dumps({"streams": [stream]}))
    return tmp_path


@pytest.fixture
def clip(tools):
    frames = np.stack([picture(seed=seed) for seed in range(3)])
    (tools / "in.mp4").write_bytes(frames.tobytes())
    return frames


def test_frames_times_and_sound(tools, clip):
    steps, expected = [], []
    upscale_video(tools / "in.mp4", tools / "out.mp4", repeated, 2, lambda: steps.append(1), expected.append)
    found = stream_of(tools / "out.mp4")
    for (time, duration, frame), number, source in zip(found, range(3), clip, strict=True):
        assert time == round(number * 1001 / 30000 * 1e9)
        assert duration == round(1001 / 30000 * 1e9)
        np.testing.assert_array_equal(frame.reshape(40, 60, 3), repeated(source))
    assert (len(steps), expected) == (3, [3])
    calls = [json.loads(line) for line in (tools / "notes").read_text().splitlines()]
    writer = calls[-1] if calls[-1][-1] != "pipe:1" else calls[-2]
    assert writer[writer.index("-itsoffset") + 1] == f"{7 * 1001 / 30000:.9f}"
    assert writer.index("-itsoffset") < writer.index("-i")  # an option of the input
    for pair in (("-vsync", "0"), ("-map_metadata", "1"), ("-map_chapters", "1"), ("-map", "0:v:0")):
        assert writer[writer.index(pair[0]) + 1] == pair[1]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [("bad input", DataError, "after 3 frames: moov atom"), ("full disk", StorageError, "No space left on device")],
)
def test_failures_leave_nothing(tools, clip, monkeypatch, mode, error, message):
    monkeypatch.setenv("MODE", mode)
    with pytest.raises(error, match=message):
        upscale_video(tools / "in.mp4", tools / "out.mp4", repeated, 2, lambda: None)
    assert not list(tools.glob("*out*"))


def test_videos_in_step_end_with_the_shortest(tools, clip):
    (tools / "other.mp4").write_bytes((255 - clip[:2]).tobytes())
    sums = []

    def add(one, other):
        sums.append(one.astype(int) + other)
        return None if len(sums) == 1 else other  # the first step makes no frame

    convert_videos([tools / "in.mp4", tools / "other.mp4"], tools / "out.mp4", add, (20, 30), lambda: None)
    assert [(step == 255).all() for step in sums] == [True, True]
    ((time, _, frame),) = stream_of(tools / "out.mp4")
    assert time == 0
    np.testing.assert_array_equal(frame.reshape(20, 30, 3), 255 - clip[1])


def test_odd_sides_are_made_even_by_repeating_and_said(tools, clip, monkeypatch):
    stream = {"width": 25, "height": 24, "avg_frame_rate": "25/1"}
    monkeypatch.setenv("ANSWER", json.dumps({"streams": [stream]}))
    notes = convert_videos([tools / "in.mp4"], tools / "out.mp4", lambda frame: frame, (24, 25), lambda: None)
    assert notes == ["its odd sides were made even by repeating the last row or column, as most codecs require"]
    frame = stream_of(tools / "out.mp4")[0][2].reshape(24, 26, 3)
    np.testing.assert_array_equal(frame[:, :25], clip.reshape(3, 24, 25, 3)[0])
    np.testing.assert_array_equal(frame[:, 25], frame[:, 24])


def test_a_file_without_frames(tools):
    (tools / "in.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="after 0 frames"):
        upscale_video(tools / "in.mp4", tools / "out.mp4", repeated, 2, lambda: None)


def test_an_error_while_upscaling_ends_both_processes(tools, clip):
    def fail(frame):
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        upscale_video(tools / "in.mp4", tools / "out.mp4", fail, 2, lambda: None)
    assert not list(tools.glob("*out*"))


def test_a_turned_video_has_its_sides_swapped(tools, monkeypatch):
    stream = {"width": 30, "height": 20, "avg_frame_rate": "25/1", "side_data_list": [{"rotation": -90}]}
    monkeypatch.setenv("ANSWER", json.dumps({"streams": [stream]}))
    assert probe(tools / "in.mp4") == Video(30, 20, Fraction(25), None)


@pytest.mark.parametrize("answer", ["", "{}", '{"streams": []}', '{"streams": [{"avg_frame_rate": "0/0"}]}'])
def test_what_is_no_video(tools, monkeypatch, answer):
    monkeypatch.setenv("ANSWER", answer)
    with pytest.raises(DataError, match="not a video"):
        probe(tools / "in.mp4")


def test_without_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="Video requires the program ffprobe, which is not on the PATH"):
        probe(tmp_path / "in.mp4")


def run(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True)


def described(path):
    command = ["ffprobe", "-v", "error", "-show_streams", "-show_format", "-show_chapters", "-of", "json", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def times(path):
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "frame=best_effort_timestamp_time"]
    found = subprocess.run([*command, "-of", "csv=p=0", str(path)], check=True, capture_output=True, text=True).stdout
    return [float(line.strip(",")) for line in found.split()]


def colour(path, matrix):
    """The first pixel, by a matrix that is named."""
    command = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-i",
        str(path),
        "-vf",
        f"scale=in_color_matrix={matrix}:flags=accurate_rnd+full_chroma_int",
    ]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"], check=True, capture_output=True)
    return np.frombuffer(raw.stdout[:3], np.uint8).astype(int)


@needs_ffmpeg
@pytest.mark.parametrize(("suffix", "is_flow"), [(".mp4", False), (".mkv", True)])
def test_a_film_that_starts_after_its_sound_keeps_both_starts(tmp_path, suffix, is_flow):
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    sound, frames = ("-f", "lavfi", "-i", "sine=d=1.2"), ("-f", "lavfi", "-i", "testsrc=s=32x24:d=0.1:r=50")
    options = ["-c:a", "flac", "-strict", "-2", "-vsync", "0"]
    run(*sound, "-itsoffset", "1.02", *frames, "-map", "1:v", "-map", "0:a", *options, source)
    before, seen = times(source), []

    def flow(frame):
        seen.append(frame)
        return None if len(seen) == 1 else frame

    if is_flow:
        notes = convert_videos([source], target, flow, (24, 32), lambda: None)
    else:
        notes = upscale_video(source, target, repeated, 2, lambda: None)
    assert notes == []
    starts = [float(described(path)["streams"][1]["start_time"]) for path in (source, target)]
    assert before[0] - starts[0] == pytest.approx(1.02, abs=0.002)
    after = np.array(times(target)) - starts[1]
    np.testing.assert_allclose(after, np.array(before[: 4 if is_flow else 5]) - starts[0], atol=0.0011)


@needs_ffmpeg
def test_a_rate_that_varies_is_kept(tmp_path):
    keep = "select='not(mod(n\\,3))+eq(mod(n\\,7)\\,1)'"
    run("-f", "lavfi", "-i", "testsrc=s=32x24:d=1:r=25", "-vf", keep, "-vsync", "0", tmp_path / "in.mkv")
    before = times(tmp_path / "in.mkv")
    assert len(set(np.round(np.diff(before), 3))) > 1
    for name in ("out.mkv", "out.mp4"):
        upscale_video(tmp_path / "in.mkv", tmp_path / name, repeated, 2, lambda: None)
        assert times(tmp_path / name) == before


@needs_ffmpeg
@pytest.mark.parametrize(
    ("size", "scale", "matrix", "tagged"),
    [((1280, 720), 1, "bt709", None), ((640, 360), 2, "smpte170m", "smpte170m"), ((64, 48), 2, "smpte170m", None)],
)
def test_colours_of_a_film_without_tags_stay(tmp_path, size, scale, matrix, tagged):
    source = f"color=0xC02F1F:s={size[0]}x{size[1]}:d=0.04:r=25"
    exact = "flags=accurate_rnd+full_chroma_int"
    made = f"scale=out_color_matrix={matrix}:{exact},format=yuv420p,setparams=colorspace=unknown"
    run("-f", "lavfi", "-i", source, "-vf", made, tmp_path / "in.mp4")
    assert "color_space" not in described(tmp_path / "in.mp4")["streams"][0]
    seen = []

    def enlarge(frame):
        seen.append(frame[0, 0])
        return repeated(frame, scale)

    upscale_video(tmp_path / "in.mp4", tmp_path / "out.mp4", enlarge, scale, lambda: None)
    assert np.abs(seen[0].astype(int) - (192, 47, 31)).max() <= 2
    assert np.abs(colour(tmp_path / "out.mp4", matrix) - (192, 47, 31)).max() <= 2
    assert np.abs(colour(tmp_path / "out.mp4", matrix) - colour(tmp_path / "in.mp4", matrix)).max() <= 1
    assert described(tmp_path / "out.mp4")["streams"][0].get("color_space") == tagged


@needs_ffmpeg
def test_sound_subtitles_titles_chapters_pixels_and_tags_are_kept_or_told(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,010 --> 00:00:00,100\nHello\n")
    (tmp_path / "meta").write_text(";FFMETADATA1\ntitle=My film\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=100\n")
    made = ["-f", "lavfi", "-i", "testsrc=s=32x24:d=0.2:r=25", "-f", "lavfi", "-i", "sine=d=0.2"]
    made += ["-i", tmp_path / "a.srt", "-i", tmp_path / "meta", "-map", "0:v", "-map", "1:a", "-map", "2:s"]
    made += ["-map_metadata", "3", "-map_chapters", "3", "-c:a", "pcm_s16le", "-c:s", "srt", "-vf", "setsar=4/3"]
    tags = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
    made += [part for key, value in tags.items() for part in (f"-{key}", value)]
    run(*made, "-metadata:s:a:0", "language=deu", tmp_path / "in.mkv")
    notes = {
        suffix: upscale_video(tmp_path / "in.mkv", tmp_path / f"out{suffix}", repeated, 2, lambda: None)
        for suffix in (".mkv", ".mp4")
    }
    assert notes[".mkv"] == []
    assert (
        notes[".mp4"]
        == [
            "its sound (pcm_s16le) was converted to aac, since .mp4 does not support it",
            "its subtitles (subrip) was converted to mov_text, since .mp4 does not support it",
        ]
        or "sound" not in notes[".mp4"][0]
    )  # newer versions of ffmpeg put PCM into MP4
    for suffix in notes:
        found = described(tmp_path / f"out{suffix}")
        video, sound, subtitles = found["streams"][:3]
        assert found["format"]["tags"]["title"] == "My film"
        assert len(found["chapters"]) == 1
        assert video["sample_aspect_ratio"] == "4:3"
        assert [video[key] for key in ("color_space", "color_primaries", "color_transfer")] == ["bt709"] * 3
        assert (sound["codec_type"], sound["tags"]["language"]) == ("audio", "deu")
        assert subtitles["codec_name"] == ("subrip" if suffix == ".mkv" else "mov_text")


@needs_ffmpeg
def test_what_ffmpeg_cannot_read_is_one_line(tmp_path):
    (tmp_path / "in.mp4").write_text("no video")
    with pytest.raises(DataError, match="not a video that ffprobe can read") as error:
        upscale_video(tmp_path / "in.mp4", tmp_path / "out.mp4", repeated, 2, lambda: None)
    assert "\n" not in str(error.value)
    # A playlist may not make ffmpeg open anything else.
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n")
    with pytest.raises(DataError):
        probe(tmp_path / "list.mp4")


@pytest.mark.parametrize(
    ("stream", "notes"),
    [
        ({"pix_fmt": "yuv420p"}, []),
        ({"pix_fmt": "yuv420p10le"}, ["its 10 bits per channel became 8"]),
        ({"pix_fmt": "yuva420p"}, ["its alpha was left out"]),
        ({"pix_fmt": "yuv420p", "tags": {"ALPHA_MODE": "1"}}, ["its alpha was left out"]),
        (
            {"pix_fmt": "p010le", "color_transfer": "smpte2084", "side_data_list": [{"side_data_type": "DOVI x"}]},
            [
                "its 10 bits per channel became 8",
                "it is HDR: its colour tags are kept, but not the metadata of its mastering display",
                "left out: dovi x",
            ],
        ),
        ({"field_order": "tt"}, ["it is interlaced, and frames were processed as a whole, with both fields"]),
    ],
)
def test_what_frames_cannot_carry_is_said(stream, notes):
    assert what_is_lost(stream) == notes


def test_matrices_and_tags():
    assert colours_of({}, 720, 1280).from_rgb(1440, 2560)[1] == []
    assert colours_of({}, 480, 640).from_rgb(960, 1280)[1] == ["-colorspace", "smpte170m", "-color_range", "tv"]
    hdr = {"color_space": "bt2020nc", "color_primaries": "bt2020", "color_transfer": "smpte2084"}
    text, options = colours_of(hdr, 720, 1280).from_rgb(1440, 2560)
    assert "out_color_matrix=bt2020:out_range=limited" in text
    assert options[:6] == ["-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", "smpte2084"]
    full = colours_of({"pix_fmt": "yuvj420p"}, 720, 1280)
    assert "in_range=full" in full.to_rgb()
    assert "in_color_matrix" not in colours_of({"pix_fmt": "gbrp", "color_space": "gbr"}, 720, 1280).to_rgb()


def test_the_reason_is_the_one_that_says_something():
    told = (
        "[mp4 @ 0x55d0c8a] Could not find tag for codec pcm_s16le in stream #1, codec not currently supported in "
        "container\nCould not write header for output file #0 (incorrect codec parameters ?): Invalid argument\n"
        "Error initializing output stream 0:0 -- \n"
    )
    assert reason(told).startswith("Could not find tag for codec pcm_s16le in stream #1")
    assert "initializing" not in reason(told)
    assert reason("") == "it gave no reason"
    assert reason("Conversion failed!") == "Conversion failed!"
