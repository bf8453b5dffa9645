"""Disparity, flow and what follows from them: pixels of any kind, consistency, depth, point clouds, colours."""

import struct

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.utils import flow_to_image

from tests.predict.matchers import GAIN, Flow, Stereo, shifted, view
from visionattn.errors import InputError
from visionattn.predict import depth, estimate_disparity, estimate_flow, seen_in_both
from visionattn.predict.colours import disparity_colours, flow_colours, usual_top
from visionattn.predict.depth_files import write_depth, write_point_cloud
from visionattn.predict.flow import flow_seen_in_both
from visionattn.predict.matching import Matcher, as_tensor, describe_unknown
from visionattn.predict.stereo import looks_exchanged


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_pixels_of_any_kind(dtype, channels):
    peak = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    pixels = np.zeros((5, 6, max(channels, 1)), dtype)
    pixels[..., 0] = peak * 0.2
    if channels in (2, 4):
        pixels[..., -1] = peak  # opaque
        pixels[0, 0, -1] = 0
    pixels = pixels if channels else pixels[..., 0]
    found = as_tensor(pixels)
    assert found.shape == (1, 3, 5, 6)
    assert found.dtype == torch.float32
    grey = channels in (0, 1, 2)
    expected = [0.2, 0.2, 0.2] if grey else [0.2, 0, 0]
    torch.testing.assert_close(found[0, :, 1, 1], torch.tensor(expected), atol=1e-4, rtol=0)
    if channels in (2, 4):  # what is transparent is white
        assert found[0, :, 0, 0].tolist() == [1, 1, 1]


def test_disparity_and_flow():
    left, right = view(8, 12, 0.4), view(8, 12, 0.2, dtype=np.uint16)
    found = estimate_disparity(left, right, Stereo())
    assert (found.shape, found.dtype) == ((2, 8, 12), np.float32)
    np.testing.assert_allclose(found[0], 0.4 * GAIN, rtol=1e-5)
    np.testing.assert_allclose(found[1], 0.2 * GAIN, rtol=1e-4)
    flow = estimate_flow(left, right, Flow())
    np.testing.assert_allclose(flow[:, 3, 3], np.array([0.4, 0.4, 0.2, 0.2]) * GAIN, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_it(dtype):
    found = estimate_disparity(view(8, 12, 0.3), view(8, 12, 0.3), Stereo(), dtype=dtype)
    assert found.dtype == np.float32
    exact = estimate_disparity(view(8, 12, 0.3), view(8, 12, 0.3), Stereo())
    assert 0 < np.abs(found - exact).max() < 0.05


def test_what_overflows_is_computed_again():
    model = Stereo()
    model.gain.data.fill_(1e6)
    matcher = Matcher(model, "stereo", "fp16")
    np.testing.assert_allclose(matcher(view(8, 12, 0.4), view(8, 12, 0.4)), 4e5, rtol=1e-5)
    assert matcher.notes == ["float16 overflowed, so the pair was computed again"]


@pytest.mark.parametrize(("model", "ratios"), [(Stereo(), (2, 2)), (Flow(), (2, 2, 2, 2))])
def test_beyond_the_bound_images_are_reduced_and_results_enlarged(model, ratios):
    matcher = Matcher(model, model.task, max_pixels=16 * 24)
    found = matcher(view(32, 48, 0.4), view(32, 48, 0.4))
    assert found.shape == (len(ratios), 32, 48)
    np.testing.assert_allclose(found[:, 5, 7], 0.4 * GAIN * np.array(ratios), rtol=1e-4)
    assert matcher.notes == [
        "32 x 48 pixels exceed the maximum of 384: the pair was matched at 16 x 24 pixels, and the result enlarged"
    ]
    matcher(view(16, 24, 0.4), view(16, 24, 0.4))
    assert matcher.notes == []


def test_sides_are_enlarged_each_by_its_own_factor():
    # 3 x 100 of 12 x 400 would be 4 and 4; the bound leaves rows of 4 and columns of 133.
    found = Matcher(Flow(), "flow", max_pixels=4 * 134)(view(12, 401, 0.4), view(12, 401, 0.4))
    rows, columns = int(12 * (536 / 4812) ** 0.5), int(401 * (536 / 4812) ** 0.5)
    np.testing.assert_allclose(found[:2, 6, 200], [0.4 * GAIN * 401 / columns, 0.4 * GAIN * 12 / rows], rtol=1e-4)


def test_the_default_bound_is_by_the_free_memory(monkeypatch):
    monkeypatch.setattr("visionattn.predict.matching.free_memory", lambda device: 1000 * 2**20)
    # Floats a pixel that live at once: two images of 3, and 2 of both what is joined and the result; reckoned twice.
    assert Matcher(Stereo(), "stereo").max_pixels == 500 * 2**20 // (2 * 10 * 4)


def test_low_resolution_start():
    found = estimate_disparity(view(8, 12, 0.4), view(8, 12, 0.4), Stereo(), low_resolution_start=True)
    np.testing.assert_allclose(found, 0.4 * GAIN + 3, rtol=1e-5)
    with pytest.raises(InputError, match="must be at least 7 pixels"):
        estimate_disparity(view(6, 12, 0.4), view(6, 12, 0.4), Stereo(), low_resolution_start=True)
    model = torch.nn.Conv2d(3, 3, 1)
    model.task = "stereo"
    with pytest.raises(InputError, match="Conv2d does not support a low-resolution start"):
        Matcher(model, "stereo", low_resolution_start=True)


def test_enlarged_views():
    """A step edge of colours: the network reads it from four times the pixels, and disparities are halved."""
    left, right = view(6, 12, 0.4), view(6, 12, 0.2)
    left[:, 6:] = 0
    found = estimate_disparity(left, right, Stereo(), enlarge=2)
    assert found.shape == (2, 6, 12)
    np.testing.assert_allclose(found[0, :, :3], 0.2 * GAIN, rtol=1e-5)
    assert np.isnan(found[0, :, 9:]).all()  # 0 is no disparity
    np.testing.assert_allclose(found[1], 0.1 * GAIN, rtol=1e-5)
    started = estimate_disparity(left, right, Stereo(), enlarge=2, low_resolution_start=True)
    known = np.isfinite(found)
    np.testing.assert_allclose(started[known], found[known] + 1.5, rtol=1e-5)
    np.testing.assert_allclose(started[0, :, 9:], 1.5, rtol=1e-5)
    flow = estimate_flow(left, right, Flow(), enlarge=1.5)
    np.testing.assert_allclose(flow[2:], 0.2 * GAIN / 1.5, rtol=1e-4)
    # The least side of 4 is one of the views that the network sees.
    assert estimate_disparity(view(2, 3, 0.4), view(2, 3, 0.4), Stereo(), enlarge=2).shape == (2, 2, 3)
    for factor in (0.5, float("nan"), 1e6):
        with pytest.raises(InputError, match=f"from 1 to 64; got {factor}"):
            estimate_disparity(left, right, Stereo(), enlarge=factor)


class Clamped(Stereo):
    """The disparity of a view is 20 times its red less 10, and 0 where that is negative."""

    def forward(self, left, right, start=None):
        return (self.gain * torch.cat([left[:, :1], right[:, :1]], 1) - 10).clamp(min=0)


def converging():
    """Views of two planes and what the network finds: 2 pixels, and behind where the axes meet -7.4 pixels."""
    red = np.rint(255 * np.where(np.arange(40) < 16, 12 / GAIN, 2.6 / GAIN)).astype(np.uint8)
    image = np.zeros((8, 40, 3), np.uint8)
    image[..., 0] = red
    return image


def test_what_lies_beyond_0_is_unknown():
    """Focal length times baseline 58.656 and doffs 28.2: 2.82 m for -7.4 pixels, and 2.08 m for the 0 in its place."""
    matcher = Matcher(Clamped(), "stereo")
    found = matcher(converging(), converging())
    np.testing.assert_allclose(found[:, :, :16], 2, atol=0.05)
    assert np.isnan(found[:, :, 16:]).all()
    assert matcher.unknown == pytest.approx(0.6)
    seen, metres = seen_in_both(found), depth(found[0], 586.56, 0.1, doffs=28.2)
    assert not seen[:, 16:].any()
    assert seen[:, 2:16].all()
    assert np.isnan(metres[:, 16:]).all()
    assert np.nanmedian(metres) == pytest.approx(58.656 / 30.2, abs=0.01)
    assert np.isnan(estimate_disparity(converging(), converging(), Clamped())[:, :, 16:]).all()
    # The arrays of a network itself say the same.
    assert not seen_in_both(np.nan_to_num(found))[:, 16:].any()
    assert describe_unknown(0.6)[0].startswith("60.0% of the left view have no disparity")
    assert describe_unknown(0.0001)[0].startswith("less than 0.1% of the left view")
    assert describe_unknown(0.6, filled=True)[0].startswith("60.0% of the left view had no disparity before filling, ")
    assert describe_unknown(0) == []


@pytest.mark.parametrize("settings", [{"enlarge": 2}, {"max_pixels": 4 * 20}, {"enlarge": 1.5, "max_pixels": 5 * 25}])
def test_the_unknown_is_not_averaged_with_what_is_known(settings):
    found = Matcher(Clamped(), "stereo", **settings)(converging(), converging())
    ratio = settings.get("enlarge", 1) / (
        40 / int(40 * (settings["max_pixels"] / 320) ** 0.5) if "max_pixels" in settings else 1
    )
    np.testing.assert_allclose(found[:, :, :10], 2 / ratio, atol=0.1)
    assert np.isnan(found[:, :, 22:]).all()
    assert np.nanmin(found) > 0.5


def test_the_bound_of_enlarged_views_is_by_the_pixels_that_the_network_sees(monkeypatch):
    """The small pass has the size that it has without enlarging: no 3840 x 3840 pixels for a factor of 20."""
    monkeypatch.setattr("visionattn.predict.matching.free_memory", lambda device: 1000 * 2**20)
    sizes = []

    class Watched(Stereo):
        def forward(self, left, right, start=None):
            sizes.append(left.shape[2:])
            return super().forward(left, right, start)

    assert Matcher(Watched(), "stereo", enlarge=20).max_pixels == 500 * 2**20 // (2 * 10 * 4 * 400)
    assert sizes == [(192, 192)]


def test_our_networks_fit():
    model = timm.create_model("va_match_stereo_nano").eval()
    left, right = shifted(330, 352, 8)
    views = [as_tensor(pixels) for pixels in (left, right)]
    with torch.no_grad():
        expected = model(*views, model.low_resolution_start(*views))[0]
    expected[expected == 0] = torch.nan
    np.testing.assert_array_equal(estimate_disparity(left, right, model, low_resolution_start=True), expected)
    with pytest.raises(InputError, match="at least 161 pixels; got 160 x 200"):
        estimate_disparity(left[:160, :200], right[:160, :200], model)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (view(8, 12, 0), view(8, 13, 0), "must have the same size .* got 8 x 12 and 8 x 13 pixels"),
        (view(3, 12, 0), view(3, 12, 0), "at least 4 pixels; got 3 x 12"),
        (np.full((8, 8), np.nan, np.float32), view(8, 8, 0), "not finite"),
        (np.full((8, 8), 2.0), view(8, 8, 0), r"Floats must be in 0\.\.1; got 2\.0 to 2\.0"),
        (np.zeros((8, 8), np.int32), view(8, 8, 0), "got int32"),
        (np.zeros((8, 8, 5), np.uint8), view(8, 8, 0), r"got \(8, 8, 5\)"),
        (np.zeros((0, 8), np.uint8), view(8, 8, 0), r"got \(0, 8, 1\)"),
    ],
)
def test_images_that_are_not_accepted(left, right, message):
    with pytest.raises(InputError, match=message):
        estimate_disparity(left, right, Stereo())


def test_models_and_arguments_that_are_not_accepted():
    pair = view(8, 12, 0.5), view(8, 12, 0.5)
    with pytest.raises(
        InputError,
        match=r"Flow cannot be used here: it is a 'flow' model; a 'stereo' model is required\. `visionattn list`",
    ):
        estimate_disparity(*pair, Flow())
    with pytest.raises(InputError, match="Linear cannot be used here: it states no task"):
        estimate_flow(*pair, torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="max_pixels must be at least 1; got 0"):
        estimate_disparity(*pair, Stereo(), max_pixels=0)
    with pytest.raises(InputError, match=r"are 2 x 3, but sides must be at least 4: raise --max-pixels"):
        estimate_disparity(*pair, Stereo(), max_pixels=8)
    broken = Stereo()
    broken.gain.data.fill_(torch.nan)
    with pytest.raises(InputError, match="output is not finite"):
        estimate_disparity(*pair, broken)


def test_memory_that_ends_is_told(monkeypatch):
    def full(self, left, right, start=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = Stereo()
    matcher = Matcher(model, "stereo")
    monkeypatch.setattr(Stereo, "forward", full)
    with pytest.raises(InputError, match=r"8 x 12 pixels do not fit the memory: lower --max-pixels"):
        matcher(view(8, 12, 0.5), view(8, 12, 0.5))


def test_consistency_of_flow():
    flow = np.zeros((4, 6, 8), np.float32)
    flow[0], flow[1], flow[2], flow[3] = 2, -1, -2, 1
    flow[2, 1, 5] = 3.0  # the way back of (3, 2)
    expected = np.ones((6, 8), bool)
    expected[:, 6:] = expected[0] = False  # out of the image
    expected[2, 3] = False
    np.testing.assert_array_equal(flow_seen_in_both(flow), expected)


def test_depth():
    found = depth(np.array([[10.0, 0.0, 20.0]]), focal=1000, baseline=0.2)
    np.testing.assert_array_equal(found, [[20.0, np.nan, 10.0]])
    assert depth(np.array([[10.0]]), 1000, 0.2, doffs=30)[0, 0] == 5
    for settings, word in (
        ({"focal": 0}, "focal length must be .* got 0"),
        ({"focal": 1e300}, r"focal length must be .* got 1e\+300"),
        ({"baseline": float("nan")}, "baseline must be .* got nan"),
        ({"doffs": float("nan")}, "principal points must be .* got nan"),
        ({"doffs": float("-inf")}, "principal points must be .* got -inf"),
    ):
        with pytest.raises(InputError, match=word):
            depth(np.ones((1, 1)), **{"focal": 1000, "baseline": 0.2} | settings)


def test_depth_files(tmp_path):
    metres = np.array([[1.2345, np.nan, 70.0, 65.535]])
    notes = write_depth(tmp_path / "a.png", metres)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), [[1234, 0, 0, 65535]])
    assert notes == ["25.0% of the depth is beyond the 65.5 m of a PNG in millimetres and became 0"]
    assert write_depth(tmp_path / "a.npy", metres) == []
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), metres.astype(np.float32))


def test_point_cloud(tmp_path):
    metres = np.array([[2.0, np.nan], [np.nan, 4.0]], np.float32)
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    write_point_cloud(tmp_path / "a.ply", metres, colours, focal=10)
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert header.splitlines()[:3] == [b"ply", b"format binary_little_endian 1.0", b"element vertex 2"]
    points = [struct.unpack("<3f3B", body[start : start + 15]) for start in (0, 15)]
    np.testing.assert_allclose(points[0], [-0.1, -0.1, 2, 0, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(points[1], [0.2, 0.2, 4, 9, 10, 11], rtol=1e-6)
    write_point_cloud(tmp_path / "a.ply", metres, colours, 10, (0.0, 1.0))
    body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[2]
    np.testing.assert_allclose(struct.unpack("<3f", body[:12]), [0, -0.2, 2], rtol=1e-6)
    for focal, point in ((float("nan"), None), (10, (float("nan"), 1.0))):
        with pytest.raises(InputError, match="must be finite"):
            write_point_cloud(tmp_path / "b.ply", metres, colours, focal, point)
    assert not (tmp_path / "b.ply").exists()


def test_turbo_is_opencvs():
    steps = np.arange(256, dtype=np.uint8)[None]
    expected = cv2.applyColorMap(steps, cv2.COLORMAP_TURBO)[..., ::-1].astype(int)
    found = disparity_colours(steps.astype(np.float32), 255)
    # The polynomials leave the table at its ends most.
    assert np.abs(found - expected).max() <= 32
    assert np.abs(found - expected).mean() < 7


def test_colours_leave_out_what_has_no_value():
    disparity = np.array([[0.0, 10.0, np.nan]])
    assert disparity_colours(disparity)[0, 2].tolist() == [0, 0, 0]
    assert usual_top(disparity) == pytest.approx(9.95)
    assert usual_top(np.full((2, 2), np.nan)) == usual_top(np.zeros((2, 2))) == 1
    flow = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)
    expected = flow_to_image(torch.from_numpy(flow).movedim(2, 0)).movedim(0, 2).numpy()
    np.testing.assert_array_equal(flow_colours(flow), expected)
    flow[1, 1] = np.nan
    assert flow_colours(flow)[1, 1].tolist() == [0, 0, 0]


def test_exchanged_views_are_recognised():
    left, right = shifted(60, 90, 8)
    assert looks_exchanged(right, left)
    assert not looks_exchanged(left, right)
    assert not looks_exchanged(left, left)
    assert not looks_exchanged(np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90, 3), np.uint8))
    rng = np.random.default_rng(0)
    assert not looks_exchanged(*(rng.integers(0, 256, (60, 90), dtype=np.uint8) for _ in range(2)))
