"""`visionattn.stereo` and `visionattn.flow`: what the commands write, of images of every kind."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from tests.export import graphs
from tests.predict.matchers import GAIN, Flow, Stereo, shifted, view
from visionattn.errors import DataError, InputError
from visionattn.export import examples
from visionattn.export.variants import write_variants
from visionattn.predict import depth, estimate_disparity, estimate_flow, seen_in_both


def kinds(pixels, path):
    """The same image as an array, a PIL image, a tensor and a path."""
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).movedim(-1, 0) / 255
    return [pixels, Image.fromarray(pixels), tensor, tensor.double(), path, str(path)]


def test_images_of_every_kind(tmp_path):
    left, right = shifted(12, 20, 3)
    expected = estimate_disparity(left, right, Stereo())
    moved = estimate_flow(left, right, Flow())
    for first, second in zip(kinds(left, tmp_path / "l.png"), kinds(right, tmp_path / "r.png")):
        found = visionattn.stereo(first, second, Stereo())
        np.testing.assert_allclose([found.disparity, found.right], expected, atol=1e-5)
        np.testing.assert_array_equal(found.nonocc, seen_in_both(expected))
        assert found.depth is None
        found = visionattn.flow(first, second, Flow())
        np.testing.assert_allclose(np.concatenate([found.flow, found.backward], 2), moved.transpose(1, 2, 0), atol=1e-5)
        assert found.nonocc.shape == (12, 20)


def test_files_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(view(12, 8, 0.4)).save(tmp_path / "l.png", exif=exif)
    assert visionattn.stereo(tmp_path / "l.png", view(8, 12, 0.4), Stereo()).disparity.shape == (8, 12)


def test_depth_comes_with_a_calibration():
    views = view(8, 12, 0.4), view(8, 12, 0.4)
    found = visionattn.stereo(*views, Stereo(), focal=100, baseline=0.2, doffs=2)
    np.testing.assert_array_equal(found.depth, depth(found.disparity, 100, 0.2, 2))
    assert found.depth[0, 0] == pytest.approx(100 * 0.2 / (0.4 * GAIN + 2))
    found = visionattn.stereo(*views, Stereo(), focal=100, baseline=0.2, doffs=-9)
    assert found.notes == ["100.0% have a disparity and no depth: disparity and --doffs together are not above 0"]
    for calibration in ({"focal": 3}, {"baseline": 3}, {"doffs": 1}, {"focal": 0, "baseline": 1}):
        with pytest.raises(InputError, match=r"baseline|focal"):
            visionattn.stereo(*views, Stereo(), **calibration)


def test_filled_disparities_have_depth_and_stay_occluded():
    left, right = view(8, 12, 0.1), view(8, 12, 0.1)
    left[:, 6:9, 0] = 0
    plain, filled = (
        visionattn.stereo(left, right, Stereo(), focal=10, baseline=1, fill=each) for each in (False, True)
    )
    assert np.isnan(plain.depth[:, 6:9]).all()
    np.testing.assert_allclose(filled.disparity, 0.1 * GAIN, atol=0.1)
    np.testing.assert_allclose(filled.depth, 10 / filled.disparity)
    np.testing.assert_array_equal(filled.nonocc, plain.nonocc)
    assert not filled.nonocc[:, 6:9].any()
    assert plain.notes[0].startswith("25.0% of the left view have no disparity, since")
    assert filled.notes[0].startswith("25.0% of the left view had no disparity before filling, since")


def test_results_are_one_line():
    left = view(8, 12, 0.4)
    left[:, 6:, 0] = 0
    found = visionattn.stereo(left, left, Stereo(), focal=10, baseline=1)
    assert repr(found) == (
        "StereoMatch(8 x 12 pixels, disparity 8 to 8, 0.0% non-occluded, depth 1.25 to 1.25 m, notes: 1)"
    )
    assert "50.0% of the left view have no disparity" in found.notes[0]
    assert "disparity unknown" in repr(visionattn.stereo(view(8, 12, 0), view(8, 12, 0), Stereo()))
    found = visionattn.flow(view(8, 12, 0), view(8, 12, 0.4), Flow())
    assert repr(found) == "FlowMatch(8 x 12 pixels, lengths 0 to 0, 0.0% non-occluded)"


def test_files_are_what_the_functions_give(tmp_path, capsys):
    left, right = shifted(16, 24, 3)
    for name, pixels in (("l", left), ("r", right)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    paths = tmp_path / "l.png", tmp_path / "r.png"
    outcome = visionattn.stereo_files(*paths, tmp_path / "o.npy", Stereo(), nonocc=True, focal=10, baseline=1)
    assert (outcome.written, outcome.failed, outcome.exit_code) == ([tmp_path / "o.npy"], [], 0)
    found = visionattn.stereo(*paths, Stereo(), focal=10, baseline=1)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), found.disparity)
    np.testing.assert_array_equal(np.load(tmp_path / "o_depth.npy"), found.depth)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o_nonocc.png")) > 0, found.nonocc)
    visionattn.flow_files(paths, tmp_path / "f.npy", Flow())
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), visionattn.flow(*paths, Flow()).flow)
    outcome = visionattn.flow_files(paths, tmp_path / "f.npy", Flow(), skip_existing=True)
    assert repr(outcome) == "Outcome(0 written, 1 skipped, 0 failed)"
    outcome = visionattn.flow_files(paths, tmp_path / "f.npy", Flow())
    assert outcome.exit_code == 1
    assert outcome.failed[0][0] == paths[0]
    assert "exists. Use --overwrite" in outcome.failed[0][1]
    assert "skipped: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "must be an array"),
        (torch.zeros(1, 3, 8, 12), r"must be floats \(C, H, W\); got torch.float32 \(1, 3, 8, 12\)"),
        (torch.zeros(3, 8, 12, dtype=torch.uint8), "torch.uint8"),
        (view(8, 13, 0.4), "must have the same size"),
    ],
)
def test_images_that_are_not_accepted(image, message):
    for function, model in ((visionattn.stereo, Stereo()), (visionattn.flow, Flow())):
        with pytest.raises(InputError, match=message):
            function(view(8, 12, 0.4), image, model)


def test_models_that_are_not_accepted():
    views = view(8, 12, 0.4), view(8, 12, 0.4)
    with pytest.raises(InputError, match="a 'stereo' model is required"):
        visionattn.stereo(*views, Flow())
    with pytest.raises(DataError, match="lost"):
        visionattn.stereo("lost.png", views[1], Stereo())
    with pytest.raises(InputError, match="dtype must be one of"):
        visionattn.stereo(*views, Stereo(), dtype="int8")


def test_exported_files_and_their_variants(tmp_path, monkeypatch):
    source = graphs.matcher(tmp_path / "toy.onnx")
    monkeypatch.setattr(examples, "_GENERATED", (3, (48, 64), 16.0))
    monkeypatch.setattr(examples, "_stereo_pairs", cache(examples._stereo_pairs.__wrapped__))
    write_variants(source, tmp_path / "net.onnx", fp16=True, preprocess=True)
    left, right = shifted(24, 32, 5)
    expected = visionattn.stereo(left, right, Stereo(), max_pixels=10**6).disparity
    for name in ("toy.onnx", "net.onnx", "net.fp16.onnx"):
        found = visionattn.stereo(left, right, tmp_path / name, max_pixels=10**6)
        np.testing.assert_allclose(found.disparity, expected, atol=0.02)
    assert visionattn.stereo(left, right, tmp_path / "toy.onnx").disparity.shape == (24, 32)
    with pytest.raises(InputError, match="in its own precision: leave out --dtype"):
        visionattn.stereo(left, right, tmp_path / "toy.onnx", dtype="float16")
    with pytest.raises(InputError, match="leave out --checkpoint"):
        visionattn.stereo(left, right, tmp_path / "toy.onnx", checkpoint="a.pth")
    with pytest.raises(InputError, match="its task is 'stereo', not 'flow'"):
        visionattn.flow(left, right, tmp_path / "toy.onnx")
    with pytest.raises(InputError, match="does not support a low-resolution start"):
        visionattn.stereo(left, right, tmp_path / "toy.onnx", low_resolution_start=True)
