"""Video, with stand-ins for ffmpeg and ffprobe that speak their command lines: frames in a plain file."""

import json
import os
import sys
from fractions import Fraction

import numpy as np
import pytest

from predict.upscalers import picture, repeated
from visionattn.errors import DataError, InputError, StorageError
from visionattn.predict.video import Video, convert_videos, probe, upscale_video

# The stand-in's video is raw RGB. It notes the arguments that it was called with, for the tests to look at.
FFMPEG = """
import json, os, sys
arguments = sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(arguments) + "\\n")
source, target = arguments[arguments.index("-i") + 1], arguments[-1]
mode = os.environ.get("MODE", "")
if target == "pipe:1":
    sys.stdout.buffer.write(open(source, "rb").read())
    if mode == "bad input":
        sys.exit("moov atom not found")
elif mode == "full disk":
    sys.exit("No space left on device")
else:
    open(target, "wb").write(sys.stdin.buffer.read())
"""
FFPROBE = """
import os, sys
print(os.environ["ANSWER"])
"""


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


def test_frames_rate_and_sound(tools, clip):
    steps = []
    upscale_video(tools / "in.mp4", tools / "out.mp4", repeated, 2, lambda: steps.append(1))
    found = np.fromfile(tools / "out.mp4", np.uint8).reshape(3, 40, 60, 3)
    np.testing.assert_array_equal(found, clip.repeat(2, axis=1).repeat(2, axis=2))
    assert len(steps) == 3
    calls = [json.loads(line) for line in (tools / "notes").read_text().splitlines()]
    writer = next(call for call in calls if call[-1] != "pipe:1")
    for pair in (("-s", "60x40"), ("-r", "30000/1001"), ("-c:a", "copy"), ("-map", "0:v:0")):
        assert writer[writer.index(pair[0]) + 1] == pair[1]
    assert writer.index("-r") < writer.index("-i")  # an option of the input
    assert "1:a?" in writer


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
    found = np.fromfile(tools / "out.mp4", np.uint8).reshape(1, 20, 30, 3)
    np.testing.assert_array_equal(found[0], 255 - clip[1])


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
    with pytest.raises(InputError, match="Video needs the program ffprobe, which is not on the PATH"):
        probe(tmp_path / "in.mp4")
