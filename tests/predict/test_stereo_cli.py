"""`visionattn stereo` and `visionattn flow`: files, folders, videos, what is written beside, and clear refusals."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.predict.matchers import GAIN, Flow, Stereo, shifted, view
from visionattn.cli import main
from visionattn.data.matching.disparity import read_disparity, read_flow
from visionattn.predict import pairs
from visionattn.predict.colours import disparity_colours


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of models whose results are known."""
    monkeypatch.chdir(tmp_path)
    models = {"stereo.pth": Stereo, "flow.pth": Flow}
    for name in models:
        (tmp_path / name).touch()
    monkeypatch.setattr("visionattn.opening.load", lambda path, name=None: models[path.name]().eval())
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
    return tmp_path


def save(path, pixels):
    Image.fromarray(pixels).save(path)


def run(command, *arguments):
    return main([command, *map(str, arguments), "--model", f"{command}.pth"])


@pytest.fixture
def pair(folder):
    save(folder / "l.png", view(8, 12, 0.4))
    save(folder / "r.png", view(8, 12, 0.4))
    return "l.png", "r.png"


@pytest.mark.parametrize("suffix", ["png", "pfm", "npy", "npz"])
def test_the_suffix_says_the_format(folder, pair, suffix, capsys):
    assert run("stereo", *pair, f"out.{suffix}") == 0
    np.testing.assert_allclose(read_disparity(folder / f"out.{suffix}"), np.full((8, 12), 0.4 * GAIN), atol=1 / 256)
    assert capsys.readouterr().out == f"wrote out.{suffix}\n"
    assert run("stereo", *pair, "out.jpg") == 1
    assert "its suffix is none of .png, .pfm, .npy, .npz" in capsys.readouterr().out


def test_everything_beside(folder, pair):
    calibration = ["--focal", 100, "--baseline", 0.2, "--doffs", 2, "--principal-point", 0, 0]
    assert run("stereo", *pair, "out.png", "--color", "--nonocc", "--ply", *calibration) == 0
    names = {path.name for path in folder.glob("out*")}
    assert names == {"out.png", "out_color.png", "out_nonocc.png", "out_depth.png", "out.ply"}
    nonocc = np.asarray(Image.open(folder / "out_nonocc.png"))
    np.testing.assert_array_equal(nonocc, np.tile(np.where(np.arange(12) >= 8, 255, 0), (8, 1)))
    assert np.asarray(Image.open(folder / "out_color.png")).shape == (8, 12, 3)
    assert (np.asarray(Image.open(folder / "out_depth.png")) == 2000).all()  # 100 * 0.2 / (8 + 2) metres
    assert b"element vertex 32\n" in (folder / "out.ply").read_bytes()


def test_disparities_that_the_principal_points_cancel_are_told(folder, pair, capsys):
    assert run("stereo", *pair, "out.npy", "--focal", 100, "--baseline", 0.2, "--doffs", -9) == 0
    assert np.isnan(np.load(folder / "out_depth.npy")).all()
    assert "100.0% have a disparity and no depth" in capsys.readouterr().out


def test_folders_go_by_name_and_can_be_resumed(folder, capsys):
    for name, value in (("a", 0.2), ("b", 0.4)):
        save(folder / "left" / f"{name}.png", view(8, 12, value))
        save(folder / "right" / f"{name}.jpg", view(8, 12, value))
    (folder / "right" / "b.jpg").write_bytes(b"junk")
    assert run("stereo", "left", "right", "out", "--format", "pfm") == 1
    told = capsys.readouterr().out
    assert "failed: right/b.jpg is not an image" in told
    assert told.endswith("1 of 2 failed: left/b.png\n")
    save(folder / "right" / "b.jpg", view(8, 12, 0.4))
    assert run("stereo", "left", "right", "out", "--format", "pfm", "--skip-existing") == 0
    assert capsys.readouterr().out == "skipped: out/a.pfm exists\nwrote out/b.pfm\n"
    np.testing.assert_allclose(read_disparity(folder / "out" / "b.pfm"), 0.4 * GAIN, rtol=1e-5)
    assert run("stereo", "left", "right", "out", "--format", "pfm") == 1
    assert "out/a.pfm exists. Use --overwrite" in capsys.readouterr().out


def test_grey_of_16_bits_and_alpha(folder):
    save(folder / "l.png", view(8, 12, 0.4, 1, np.uint16)[..., 0])
    save(folder / "r.png", np.dstack([view(8, 12, 0.4), view(8, 12, 1.0, 1)]))
    assert run("stereo", "l.png", "r.png", "out.pfm") == 0
    np.testing.assert_allclose(read_disparity(folder / "out.pfm"), 0.4 * GAIN, rtol=1e-4)


def test_exchanged_views_are_told(folder, capsys):
    left, right = shifted(60, 90, 8)
    save(folder / "l.png", left)
    save(folder / "r.png", right)
    assert run("stereo", "l.png", "r.png", "a.pfm") == 0
    assert "exchanged" not in capsys.readouterr().out
    assert run("stereo", "r.png", "l.png", "b.pfm") == 0
    assert "note: r.png: its matches lie to the right, so left and right seem to be swapped" in (
        capsys.readouterr().out
    )


def test_the_bound_is_told(folder, pair, capsys):
    assert run("stereo", *pair, "out.pfm", "--max-pixels", 50) == 0
    assert "note: l.png: 8 x 12 pixels exceed the maximum of 50: the pair was matched at 5 x 8" in (
        capsys.readouterr().out
    )
    assert read_disparity(folder / "out.pfm").shape == (8, 12)


def test_options_reach_the_matcher(folder):
    save(folder / "l.png", view(8, 12, 0.3))
    assert run("stereo", "l.png", "l.png", "out.pfm", "--low-resolution-start", "--dtype", "bfloat16") == 0
    found = read_disparity(folder / "out.pfm")
    exact = 76 / 255 * GAIN + 3
    assert found[0, 0] == pytest.approx(exact, abs=0.1)
    assert found[0, 0] != pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["l.png", "r.png", "o.png", "--focal", "3"], "--focal requires --baseline"),
        (["l.png", "r.png", "o.png", "--baseline", "3"], "--baseline requires --focal"),
        (
            ["l.png", "r.png", "o.png", "--focal", "3", "--baseline", "-1"],
            "The baseline must be above 0 and less than 1e+09; got -1.0",
        ),
        (["l.png", "r.png", "o.png", "--ply"], "--ply requires --focal and --baseline"),
        (["l.png", "r.png", "o.png", "--principal-point", "1", "1"], "--principal-point requires --focal"),
        (["l.png", "r.png", "o.png", "--max-pixels", "0"], "max_pixels must be at least 1; got 0"),
        (["l.png", "r.png", "o.png", "--format", "pfm"], "leave out --format, which is for folders"),
        (["l.png", "none.png", "o.png"], "There is no file or folder none.png"),
        (["left", "right", "out"], "left contains no image or video"),
        (
            ["l.png", "r.png", "o.png", "--model", "va_span_ch26_x4"],
            "it is a 'restore' model; a 'stereo' model is required",
        ),
        (["l.png", "r.png", "o.png", "--model", "flow.pth"], "flow.pth cannot be used here: it is a 'flow' model"),
        (["l.png", "r.png", "o.png", "--model", "va_match"], "There is no model 'va_match'"),
    ],
)
def test_mistakes_are_one_message(folder, pair, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", "stereo.pth"]
    assert main(["stereo", *arguments, *model]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (folder / "o.png").exists()


def test_views_that_do_not_belong_together(folder, pair, capsys):
    save(folder / "r.png", view(8, 13, 0.4))
    assert run("stereo", *pair, "out.png") == 1
    assert "l.png is 8 x 12 and r.png is 8 x 13; both must have the same size" in capsys.readouterr().out
    for name in ("left/a.png", "left/b.png", "right/a.png"):
        save(folder / name, view(8, 12, 0.4))
    assert run("stereo", "left", "right", "out") == 2
    assert "right has no images with the names of b.png: names must match" in capsys.readouterr().err


def test_weights_of_a_named_model(folder, pair, monkeypatch):
    asked = []
    monkeypatch.setattr("visionattn.opening.load", lambda *arguments: asked.append(arguments) or Stereo().eval())
    assert main(["stereo", *pair, "a.pfm", "--model", "va_match_stereo_tiny", "--checkpoint", "w.pth"]) == 0
    assert main(["stereo", *pair, "b.pfm", "--checkpoint", "w.pth"]) == 0
    assert asked == [("w.pth", "va_match_stereo_tiny"), (Path("w.pth"),)]


def test_weights_that_cannot_be_downloaded(pair, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("Please check your connection.\nAnd more.")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    assert main(["stereo", *pair, "out.pfm", "--model", "va_match_stereo_tiny"]) == 2
    told = capsys.readouterr().err
    assert "The weights of 'va_match_stereo_tiny' could not be downloaded: Please check your connection." in told


def test_too_small(folder, capsys):
    for name in ("l.png", "r.png"):
        save(folder / name, view(3, 12, 0.4))
    assert run("stereo", "l.png", "r.png", "out.png") == 1
    assert "failed: l.png: Height and width must be at least 4 pixels; got 3 x 12" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["flo", "png", "npy"])
def test_flow_of_two_images(folder, pair, suffix):
    assert run("flow", *pair, f"out.{suffix}", "--color", "--nonocc") == 0
    np.testing.assert_allclose(read_flow(folder / f"out.{suffix}"), np.full((8, 12, 2), 0.4 * GAIN), atol=1 / 64)
    assert (folder / "out_color.png").exists()
    assert not np.asarray(Image.open(folder / "out_nonocc.png")).any()  # no way back fits


def test_flow_along_a_folder(folder, capsys):
    for name, value in (("a", 0.2), ("b", 0.4), ("c", 0.6)):
        save(folder / "left" / f"{name}.png", view(8, 12, value))
    assert run("flow", "left", "out") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.flo", "b.flo"]
    np.testing.assert_allclose(read_flow(folder / "out" / "b.flo"), 0.4 * GAIN, rtol=1e-5)
    assert run("flow", "left/a.png", "out.flo") == 2
    assert "left/a.png is one image; flow requires two images" in capsys.readouterr().err
    assert run("flow", "a", "b", "c", "out") == 2
    assert "Flow takes one or two inputs and an output; got 3 inputs" in capsys.readouterr().err


def fake_videos(monkeypatch, folder, frames, sizes=None):
    """Let videos be lists of frames; what would be written is in the returned list."""
    shown = []
    for name in frames:
        (folder / name).touch()

    def probe(path):
        height, width = (sizes or {}).get(path.name, frames[path.name][0].shape[:2])
        return SimpleNamespace(height=height, width=width, frames=len(frames[path.name]))

    def convert(sources, target, convert, size, advance, expect):
        expect(len(frames[sources[0].name]))
        for step in zip(*(frames[path.name] for path in sources)):
            result = convert(*step)
            shown.extend([] if result is None else [result])
            advance()
        return []

    monkeypatch.setattr(pairs, "probe", probe)
    monkeypatch.setattr(pairs, "convert_videos", convert)
    return shown


def test_videos_show_colours_of_one_range(folder, monkeypatch, capsys):
    frames = [view(8, 12, value) for value in (0.4, 0.2)]
    shown = fake_videos(monkeypatch, folder, {"l.mp4": frames, "r.mp4": frames})
    assert run("stereo", "l.mp4", "r.mp4", "out.mp4", "--nonocc") == 0
    assert [picture.shape for picture in shown] == [(8, 12, 3)] * 2
    first, second = (picture[0, 0].astype(int) for picture in shown)
    assert first[0] > 100  # red: the largest of the first frame
    assert second[1] > 200  # green: half of it
    assert "note: l.mp4: --nonocc: for images only" in capsys.readouterr().out


def test_flow_along_a_video(folder, monkeypatch):
    shown = fake_videos(monkeypatch, folder, {"in.mp4": [view(8, 12, value) for value in (0.2, 0.4, 0.6)]})
    assert run("flow", "in.mp4", "out.mp4") == 0
    assert len(shown) == 2


def test_videos_of_different_size(folder, monkeypatch, capsys):
    frames = [view(8, 12, 0.4)]
    fake_videos(monkeypatch, folder, {"l.mp4": frames, "r.mp4": frames}, {"r.mp4": (9, 12)})
    assert run("stereo", "l.mp4", "r.mp4", "out.mp4") == 1
    assert "l.mp4 is 8 x 12 and r.mp4 is 9 x 12" in capsys.readouterr().out


def test_video_without_ffmpeg_is_told(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    for name in ("l.mp4", "r.mp4"):
        (folder / name).touch()
    assert run("stereo", "l.mp4", "r.mp4", "out.mp4") == 1
    assert "failed: l.mp4: Video requires the program ffprobe" in capsys.readouterr().out


def test_what_lies_beyond_0_is_told_and_not_in_the_cloud(folder, capsys):
    left = view(8, 12, 0.4)
    left[:, 6:, 0] = 0
    for name in ("l.png", "r.png"):
        save(folder / name, left)
    assert run("stereo", "l.png", "r.png", "o.pfm", "--focal", 10, "--baseline", 1, "--doffs", 20, "--ply") == 0
    assert "note: l.png: 50.0% of the left view have no disparity" in capsys.readouterr().out
    found = read_disparity(folder / "o.pfm")
    assert np.isnan(found[:, 6:]).all()
    assert np.isnan(read_disparity(folder / "o_depth.pfm")[:, 6:]).all()
    assert b"element vertex 0\n" in (folder / "o.ply").read_bytes()  # the others have their match outside


@pytest.mark.parametrize(
    "option",
    [
        ["--doffs", "nan"],
        ["--principal-point", "nan", "nan"],
        ["--focal", "1e300"],
        ["--baseline", "inf"],
        ["--enlarge", "1e6"],
        ["--enlarge", "0.5"],
        ["--enlarge", "nan"],
        ["--max-pixels", "-1"],
        ["--max-pixels", "1e9"],
    ],
)
def test_numbers_that_make_no_sense(pair, option, capsys):
    assert run("stereo", *pair, "o.pfm", *option) == 2
    told = capsys.readouterr().err
    assert f"argument {option[0]}: must be a" in told
    assert told.count("\n") == 1


def test_wrong_onnx_files_are_refused_on_one_line(folder, pair, capsys):
    (folder / "net.onnx").write_bytes(b"onnx")
    for given, message in (
        (["--model", "net.onnx"], "cannot load net.onnx"),
        (["--checkpoint", "net.onnx"], "is an ONNX file: a weight file (.pth, "),
        (["--model", "missing.ONNX"], "There is no file missing.ONNX"),
    ):
        assert main(["stereo", *pair, "o.pfm", *given]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["o_color.png", "o_nonocc.png", "o_depth.pfm", "o.ply"])
def test_what_stands_beside_an_output_is_not_replaced(folder, pair, capsys, name):
    (folder / name).write_bytes(b"mine")
    arguments = [*pair, "o.pfm", "--color", "--nonocc", "--focal", 10, "--baseline", 1, "--ply"]
    assert run("stereo", *arguments) == 1
    assert f"{name} exists. Use --overwrite" in capsys.readouterr().out
    assert (folder / name).read_bytes() == b"mine"
    assert not (folder / "o.pfm").exists()
    assert run("stereo", *arguments, "--overwrite") == 0
    assert (folder / name).read_bytes() != b"mine"


def test_an_input_is_never_replaced_by_what_stands_beside(folder, pair, capsys):
    save(folder / "o_color.png", view(8, 12, 0.4))
    before = (folder / "o_color.png").read_bytes()
    assert run("stereo", "o_color.png", "r.png", "o.pfm", "--color", "--overwrite") == 1
    assert "the output would replace the input" in capsys.readouterr().out
    assert (folder / "o_color.png").read_bytes() == before


def test_names_that_pair_up_in_two_ways(folder, capsys):
    for name in ("left/a.png", "left/b.png", "right/a.png", "right/b.png", "right/c.png"):
        save(folder / name, view(8, 12, 0.4))
    assert run("stereo", "left", "right", "out") == 0
    assert "note: right: left out 1 without a partner in left." in capsys.readouterr().out
    save(folder / "right/a.jpg", view(8, 12, 0.4))
    assert run("stereo", "left", "right", "out", "--overwrite") == 2
    assert "have the same name, so the pair is ambiguous" in capsys.readouterr().err


def test_frames_are_sorted_by_their_numbers(folder):
    for number in (1, 2, 10):
        save(folder / f"left/frame_{number}.png", view(8, 12, number / 20))
    assert run("flow", "left", "out") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["frame_1.flo", "frame_2.flo"]
    found, several = pairs.consecutive("left")
    assert several
    assert [second.name for _, second in found] == ["frame_2.png", "frame_10.png"]


def test_without_an_output_a_picture_is_written(folder, pair, capsys):
    assert run("stereo", *pair) == 0
    assert capsys.readouterr().out == "wrote disparity.png\n"
    picture = np.asarray(Image.open(folder / "disparity.png"))
    np.testing.assert_array_equal(picture, disparity_colours(np.full((8, 12), 0.4 * GAIN, np.float32)))
    assert run("stereo", *pair) == 1
    assert "disparity.png exists. Use --overwrite" in capsys.readouterr().out
    assert run("stereo", *pair, "named.png", "--format", "color", "--color") == 0
    assert (folder / "named.png").read_bytes() == (folder / "disparity.png").read_bytes()
    assert not (folder / "named_color.png").exists()
    assert run("stereo", *pair, "a.pfm", "--format", "color") == 2
    save(folder / "left" / "a.png", view(8, 12, 0.4))
    save(folder / "right" / "a.png", view(8, 12, 0.4))
    assert run("stereo", "left", "right") == 0
    assert (folder / "disparity/a.png").read_bytes() == (folder / "disparity.png").read_bytes()


def test_a_png_of_numbers_is_told(folder, pair, capsys):
    assert run("stereo", *pair, "out.png") == 0
    assert "out_color" not in "".join(path.name for path in folder.iterdir())
    assert (
        "contains disparities times 256 in 16 bits, which look dark; --color adds a colour image"
        in capsys.readouterr().err
    )
    for arguments in (["a.png", "--color"], ["a.pfm"], ["b.png", "--format", "color"], []):
        assert run("stereo", *pair, *arguments) == 0
        assert capsys.readouterr().err == ""


def test_the_right_view(folder):
    save(folder / "l.png", view(8, 12, 0.4))
    save(folder / "r.png", view(8, 12, 0.2))
    assert run("stereo", "l.png", "r.png", "out.pfm", "--right", "--color") == 0
    np.testing.assert_allclose(read_disparity(folder / "out_right.pfm"), np.full((8, 12), 0.2 * GAIN), atol=1e-4)
    names = {path.name for path in folder.glob("out*")}
    assert names == {"out.pfm", "out_color.png", "out_right.pfm", "out_right_color.png"}
    assert run("stereo", "l.png", "r.png", "--right") == 0
    assert np.asarray(Image.open(folder / "disparity_right.png")).shape == (8, 12, 3)


def test_depth_by_a_calibration_file(folder, pair, capsys):
    (folder / "calib.txt").write_text("cam0=[200 0 12; 0 100 8; 0 0 1]\ndoffs=4\nbaseline=200\nwidth=24\nheight=16\n")
    assert run("stereo", *pair, "out.npy", "--calibration", "calib.txt", "--ply") == 0
    assert "note: l.png: the calibration for 16 x 24 pixels was scaled to the images." in capsys.readouterr().out
    np.testing.assert_allclose(np.load(folder / "out_depth.npy"), 100 * 0.2 / (0.4 * GAIN + 2), rtol=1e-5)
    points = (folder / "out.ply").read_bytes().split(b"end_header\n")[1]
    places = np.frombuffer(points, [("xyz", "<f4", 3), ("rgb", "u1", 3)])["xyz"]
    np.testing.assert_allclose(places[0], [(8 - 6) * 2 / 100, (0 - 4) * 2 / 50, 2], rtol=1e-5)
    assert run("stereo", *pair, "b.npy", "--fx", 100, "--baseline", 0.2, "--doffs", 2) == 0
    np.testing.assert_array_equal(np.load(folder / "b_depth.npy"), np.load(folder / "out_depth.npy"))


def test_sub_folders_and_patterns_of_scenes(folder):
    for scene, value in (("one", 0.2), ("two/deep", 0.4)):
        for side, name in (("left", "a"), ("right", "a"), ("scenes", "im0"), ("scenes", "im1")):
            (folder / side / scene).mkdir(parents=True, exist_ok=True)
            save(folder / side / scene / f"{name}.png", view(8, 12, value))
    assert run("stereo", "left", "right", "left/out", "--format", "pfm") == 0
    np.testing.assert_allclose(read_disparity(folder / "left/out/two/deep/a.pfm"), 0.4 * GAIN, rtol=1e-5)
    np.testing.assert_allclose(read_disparity(folder / "left/out/one/a.pfm"), 0.2 * GAIN, rtol=1e-5)
    assert run("stereo", "scenes/**/im0.png", "scenes/**/im1.png", "out", "--format", "pfm") == 0
    np.testing.assert_allclose(read_disparity(folder / "out/two/deep.pfm"), 0.4 * GAIN, rtol=1e-5)
    assert sorted(path.name for path in (folder / "out").rglob("*.pfm")) == ["deep.pfm", "one.pfm"]


def test_rows_that_do_not_match_are_told(folder, capsys):
    left, right = shifted(120, 160, 8)
    save(folder / "l.png", left)
    save(folder / "r.png", np.roll(right, 5, 0))
    assert run("stereo", "l.png", "r.png", "o.pfm") == 0
    assert "rows apart in the two views (median), so that the pair does not seem to be rectified" in (
        capsys.readouterr().out
    )
