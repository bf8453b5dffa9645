"""`visionattn upscale`: files, folders, patterns; what exists stays; a bad file does not end the batch."""

import numpy as np
import pytest
import timm
from PIL import Image

from tests.predict.upscalers import Repeat, picture, repeated
from visionattn.checkpoints import load
from visionattn.cli import main
from visionattn.predict.engine import TorchEngine
from visionattn.predict.tiles import MIB


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the file of a model that repeats pixels, to be named by `--model`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").touch()
    monkeypatch.setattr(
        "visionattn.opening.load", lambda path: Repeat(2).eval() if path.name == "net.pth" else load(path)
    )
    return tmp_path


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def pixels_of(path):
    return np.asarray(Image.open(path))


def upscale(*arguments):
    return main(["upscale", *map(str, arguments), "--model", "net.pth"])


def test_one_file(folder, capsys):
    pixels = save(folder / "in.png", picture())
    assert upscale("in.png", "out.png") == 0
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), repeated(pixels))
    assert capsys.readouterr().out == "wrote out.png\n"


def test_one_pixel(folder):
    pixels = save(folder / "in.png", picture(1, 1))
    assert upscale("in.png", "out.png") == 0
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), repeated(pixels))


def test_small_memory_is_tiles(folder):
    pixels = save(folder / "in.png", picture(60, 80, 4))
    memory = 400 * TorchEngine(Repeat(2)).bytes_per_pixel / MIB
    assert upscale("in.png", "out.png", "--memory", memory, "--overlap", 3) == 0
    found, expected = pixels_of(folder / "out.png"), repeated(pixels)
    np.testing.assert_array_equal(found[..., 3], expected[..., 3])
    np.testing.assert_array_equal(found[expected[..., 3] > 0], expected[expected[..., 3] > 0])


def test_a_folder_and_the_format_of_the_name(folder):
    for name in ("a.png", "b.bmp", "c.tif"):
        save(folder / "in" / name, picture())
    (folder / "in" / "notes.txt").write_text("no image")
    assert upscale("in", "out") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.png", "b.png", "c.tif"]
    assert upscale("in/a.png", "d.jpg") == 0
    with Image.open(folder / "d.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))


def test_patterns_and_several_inputs(folder):
    for name in ("a1.png", "a2.png", "b.png"):
        save(folder / name, picture())
    assert upscale("a*.png", "b.png", "out") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a1.png", "a2.png", "b.png"]


def test_nothing_is_overwritten_unasked(folder, capsys):
    pixels = save(folder / "in.png", picture())
    old = save(folder / "out.png", picture(2, 2))
    assert upscale("in.png", "out.png") == 1
    assert "failed: in.png: out.png exists. Use --overwrite" in capsys.readouterr().out
    assert upscale("in.png", "out.png", "--skip-existing") == 0
    assert capsys.readouterr().out == "skipped: out.png exists\n"
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), old)
    assert upscale("in.png", "out.png", "--overwrite") == 0
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), repeated(pixels))
    assert upscale("in.png", "in.png", "--overwrite") == 1
    assert "would replace the input" in capsys.readouterr().out


def test_two_inputs_of_one_name(folder, capsys):
    for name in ("in/a.png", "in/a.bmp"):
        save(folder / name, picture())
    assert upscale("in", "out", "--overwrite") == 1
    assert "was written already, from another input of that name" in capsys.readouterr().out


def test_bad_files_do_not_end_the_batch(folder, capsys):
    save(folder / "in" / "good.png", picture())
    save(folder / "in" / "zgood.jpg", picture(300, 300))
    whole = (folder / "in" / "zgood.jpg").read_bytes()
    (folder / "in" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "in" / "empty.png").touch()
    (folder / "in" / "text.png").write_text("I am text.")
    assert upscale("in", "out") == 1
    lines = capsys.readouterr().out.splitlines()
    failures = [line for line in lines if line.startswith("failed: ")]
    assert len(failures) == 3
    for name, reason in (("cut.jpg", "truncated"), ("empty.png", "it is empty"), ("text.png", "it is none of PNG")):
        assert any(name in line and reason in line for line in failures)
    assert lines[-1] == "3 of 5 failed: in/cut.jpg, in/empty.png, in/text.png"
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["good.png", "zgood.jpg"]


def test_comparison(folder):
    pixels = save(folder / "in.png", picture(60, 80))
    assert upscale("in.png", "out.png", "--compare") == 0
    found = pixels_of(folder / "out_compare.png")
    np.testing.assert_array_equal(found[-120:, -160:], repeated(pixels))


def test_what_was_lost_is_said(folder, capsys):
    save(folder / "in.png", picture(channels=4))
    assert upscale("in.png", "out.jpg") == 0
    assert "note: in.png: JPEG has no alpha, so that the image was composited on white." in capsys.readouterr().out


def test_overflow_is_said(folder, capsys, monkeypatch):
    def loud(path):
        model = Repeat(2).eval()
        model.spread.weight.data *= 1e6
        return model

    monkeypatch.setattr("visionattn.opening.load", loud)
    save(folder / "in.png", picture())
    assert upscale("in.png", "out.png", "--dtype", "float16") == 0
    assert "float16 overflowed in 1 tiles, which were computed again" in capsys.readouterr().out


def test_the_old_spelling_of_the_type_works(folder, capsys):
    pixels = save(folder / "in.png", picture())
    assert upscale("in.png", "out.png", "--precision", "bf16") == 0
    assert capsys.readouterr().err == "visionattn: note: --precision is now --dtype bfloat16.\n"
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), repeated(pixels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "out.png"], "There is no file or folder none.png"),
        (["*.tiff", "out"], "contains no image or video"),
        (["in.png", "net.pth/out.png"], "Cannot write into the folder net.pth"),
        (["in.png", "out.png", "--model", "va_nothing_x4"], "There is no model 'va_nothing_x4'"),
        (["in.png", "out.png", "--model", "lost.pth"], "There is no file lost.pth"),
        (["in.png", "out.png", "--model", "lost.onnx"], "There is no file lost.onnx"),
        (["in.png", "out.png", "--model", "va_span_ch52_x3"], "No weights are published for va_span_ch52_x3"),
        (
            ["in.png", "out.png", "--model", "va_minimal_vit_nano_patch7_28"],
            "it is a 'classify' model; a 'restore' model",
        ),
        (["in.png", "out.png", "--model", "net.pth", "--scale", "4"], "scale of net.pth is 2, not 4"),
        (
            ["in.png", "out.png", "--model", "net.onnx", "--dtype", "float16"],
            "runs in ONNX Runtime in its own precision",
        ),
    ],
)
def test_mistakes_are_one_message(folder, capsys, arguments, message):
    save(folder / "in.png", picture())
    assert main(["upscale", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [("out.gif", "its suffix is none of .png"), ("out.webp", "WEBP supports at most 16383 per side")],
)
def test_targets_that_cannot_be(folder, capsys, target, message):
    save(folder / "in.png", picture(4, 9000))
    assert upscale("in.png", target) == 1
    assert message in capsys.readouterr().out
    assert not (folder / target).exists()


def test_a_checkpoint_of_another_task(folder, monkeypatch, capsys):
    monkeypatch.setattr("visionattn.opening.load", lambda path: timm.create_model("va_minimal_vit_nano_patch7_28"))
    save(folder / "in.png", picture())
    assert main(["upscale", "in.png", "out.png", "--model", "net.pth"]) == 2
    assert "it is a 'classify' model; a 'restore' model is required" in capsys.readouterr().err


def test_the_engine_is_chosen_once_and_in_long_runs_only(folder, capsys, monkeypatch):
    calls = []

    def choose(engine, images):
        calls.append(images.shape)
        return engine, "PyTorch: for a reason"

    monkeypatch.setattr("visionattn.predict.engine.faster", choose)
    for name in ("a.png", "b.png"):
        save(folder / "in" / name, picture(300, 300))
    assert upscale("in", "one") == 0
    assert calls == []
    monkeypatch.setattr("visionattn.predict.engine.WORTH_TIMING", 0)
    assert upscale("in", "two") == 0
    assert calls == [(1, 3, 192, 192)]
    assert "engine: PyTorch: for a reason" in capsys.readouterr().out


def test_onnx_runtime_on_request(folder):
    pixels = save(folder / "in.png", picture(11, 13))
    assert upscale("in.png", "out.png", "--engine", "onnxruntime") == 0
    np.testing.assert_array_equal(pixels_of(folder / "out.png"), repeated(pixels))


def test_video_without_ffmpeg_is_told(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    (folder / "in.mp4").touch()
    assert upscale("in.mp4", "out.mp4") == 1
    assert "failed: Video requires the program ffprobe" in capsys.readouterr().out
    assert upscale("in.mp4", "out.png") == 1
    assert "its suffix is none of .mp4" in capsys.readouterr().out


def test_video_frame_by_frame(folder, monkeypatch, capsys):
    frames = [picture(seed=seed) for seed in range(3)]
    results = []

    def video(source, target, enlarge, scale, advance, expect):
        expect(3)
        results.extend((enlarge(frame), advance()) for frame in frames)
        return ["its alpha was left out"]

    monkeypatch.setattr("visionattn.predict.restore_files.upscale_video", video)
    (folder / "in.mp4").touch()
    assert upscale("in.mp4", "out.mp4") == 0
    assert "note: in.mp4: its alpha was left out." in capsys.readouterr().out
    for frame, (result, _) in zip(frames, results, strict=True):
        np.testing.assert_array_equal(result, repeated(frame))


def test_a_size_for_all(folder, capsys):
    for name, shape in (("small", (10, 20)), ("large", (40, 60)), ("tiny", (3, 4))):
        save(folder / "in" / f"{name}.png", picture(*shape))
    assert upscale("in", "out", "--width", 30) == 0
    found = {path.name: pixels_of(path).shape[:2] for path in (folder / "out").iterdir()}
    assert found == {"small.png": (15, 30), "large.png": (20, 30), "tiny.png": (22, 30)}
    out = capsys.readouterr().out
    assert "note: in/large.png: it is already at least as large, and was only reduced to 20 x 30 pixels." in out
    assert "note: in/tiny.png: beyond a factor of 2, it was enlarged by interpolation." in out
    assert upscale("in/small.png", "one.png", "--width", 30, "--compare") == 0
    assert pixels_of(folder / "one_compare.png").shape == (20 + 28, 84, 3)


def test_format_and_quality(folder, capsys):
    save(folder / "in" / "a.png", picture(160, 240))
    sizes = {}
    for quality in (10, 95):
        for form in ("jpg", "webp"):
            assert upscale("in", f"out{quality}", "--format", form, "--quality", quality) == 0
            sizes[form, quality] = (folder / f"out{quality}" / f"a.{form}").stat().st_size
    assert upscale("in/a.png", "default.jpg") == 0
    assert (folder / "default.jpg").stat().st_size == sizes["jpg", 95]
    assert sizes["jpg", 10] < sizes["jpg", 95] / 2
    assert sizes["webp", 10] < sizes["webp", 95]
    capsys.readouterr()
    assert upscale("in", "out", "--quality", 10) == 0
    assert "note: in/a.png: PNG is lossless, so that the quality, which applies to JPEG and WebP, was ignored." in (
        capsys.readouterr().out
    )
