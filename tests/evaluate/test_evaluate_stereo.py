"""Stereo's errors by hand-computed cases, the table and CSV, SGBM's numbers on real pairs, and what goes wrong."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visionattn import cli
from visionattn.data.matching.disparity import write_disparity
from visionattn.errors import ConfigError, DataError, InputError, MissingPackageError
from visionattn.evaluate import disparity_errors, evaluate_stereo
from visionattn.evaluate.sgbm import fill, sgbm
from visionattn.evaluate.stereo import BASELINES

SHARED = Path(__file__).parents[3] / "shared"


class Red(nn.Module):
    """Takes 100 times the red of each view for its disparity."""

    task = "stereo"

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(100.0))

    def forward(self, left, right, start=None):
        return self.gain * torch.cat([left[:, :1], right[:, :1]], 1)


def scene(folder, truth, predicted, mask=None):
    """A scene where `Red` finds what is predicted, in steps of 100 / 255 pixels."""
    folder.mkdir(parents=True)
    red = np.rint(np.array(predicted) * 255 / 100).astype(np.uint8)
    for name in ("im0.png", "im1.png"):
        Image.fromarray(np.stack([red, 0 * red, 0 * red], axis=-1)).save(folder / name)
    write_disparity(folder / "disp0.pfm", np.array(truth))
    if mask is not None:
        Image.fromarray(np.array(mask, np.uint8)).save(folder / "mask0nocc.png")


@pytest.fixture
def scenes(tmp_path):
    step = 100 / 255
    # Errors of 0, 2, 4 and 5 steps: 0, 0.78, 1.57 and 1.96 pixels.
    truth = [[0.0, 10 * step], [20 * step, np.inf], [30 * step, 40 * step]]
    found = [[0.0, 12 * step], [16 * step, 50.0], [30 * step, 35 * step]]
    scene(tmp_path / "data" / "one", truth, found, [[255, 255], [128, 0], [255, 128]])
    scene(tmp_path / "data" / "two", [[80.0, 80.0]], [[80.0, 76 * 1.0]])
    return tmp_path / "data"


def test_errors_by_hand():
    truth = np.array([[10.0, 10, 10, 10, 100, 100, np.nan, 10, 10, 10]])
    found = np.array([[10.0, 10.5, 10.75, 13, 104.5, 106, 3, np.nan, 13.5, 8]])
    # Errors 0, 0.5, 0.75, 3, 4.5 (4.5 % of 100), 6 (6 %), no truth, missing, 3.5 (35 %), 2.
    errors = disparity_errors(found, truth)
    assert errors.epe == pytest.approx((0.5 + 0.75 + 3 + 4.5 + 6 + 3.5 + 2) / 8)
    # A bound itself is not beyond it, and what is missing is bad.
    assert errors.bad_0_5 == pytest.approx(100 * 7 / 9)
    assert errors.bad_1 == pytest.approx(100 * 6 / 9)
    assert errors.bad_2 == pytest.approx(100 * 5 / 9)
    assert errors.bad_4 == pytest.approx(100 * 3 / 9)
    assert errors.d1 == pytest.approx(100 * 3 / 9)
    assert errors.density == pytest.approx(100 * 8 / 9)


def test_errors_of_a_region():
    truth, found = np.array([[1.0, 2, 3]]), np.array([[1.0, 9, 3.25]])
    errors = disparity_errors(found, truth, np.array([[True, False, True]]))
    assert (errors.epe, errors.bad_1, errors.density) == (0.125, 0, 100)
    assert math.isnan(disparity_errors(np.full((1, 3), np.nan), truth).epe)
    with pytest.raises(InputError, match="No pixel to evaluate has ground truth"):
        disparity_errors(found, truth, np.zeros((1, 3), bool))
    with pytest.raises(InputError, match=r"The disparity has the shape \(2, 3\), but its ground truth \(1, 3\)"):
        disparity_errors(np.zeros((2, 3)), truth)


def test_a_folder(scenes):
    found = evaluate_stereo(Red(), scenes)
    assert found.failures == []
    assert [(row.scene, row.region) for row in found.rows] == [("one", "all"), ("one", "nonocc"), ("two", "all")]
    one, seen, two = (row.errors for row in found.rows)
    assert one.epe == pytest.approx((2 + 4 + 5) * 100 / 255 / 5, abs=1e-4)
    assert (one.bad_0_5, one.bad_1, one.bad_2) == pytest.approx((60, 40, 0))
    assert seen.epe == pytest.approx(2 * 100 / 255 / 3, abs=1e-4)
    assert (two.bad_2, two.d1) == pytest.approx((50, 0))  # 4 of 80 pixels are 5 %, not more
    means = found.means()
    assert [(mean.scene, mean.region) for mean in means] == [("mean of 2", "all"), ("mean of 1", "nonocc")]
    assert means[0].errors.epe == pytest.approx((one.epe + two.epe) / 2)


def test_command(scenes, tmp_path, capsys, monkeypatch):
    (tmp_path / "net.pth").touch()
    monkeypatch.setattr("visionattn.opening.load", lambda path: Red())
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    arguments = ["evaluate", "stereo", str(tmp_path / "net.pth"), "--data", str(scenes), "--baseline", "sgbm"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.csv")]) == 0
    shown = capsys.readouterr().out
    expected = evaluate_stereo(Red(), scenes)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["model"]).name, row["scene"], row["region"]) for row in rows[:6]] == [
        ("sgbm", "one", "all"),
        ("sgbm_filled", "one", "all"),
        ("net.pth", "one", "all"),
        ("sgbm", "one", "nonocc"),
        ("sgbm_filled", "one", "nonocc"),
        ("net.pth", "one", "nonocc"),
    ]
    own = [row for row in rows if row["model"].endswith("net.pth")]
    for row, found in zip(own, [*expected.rows, *expected.means()], strict=True):
        assert float(row["epe"]) == pytest.approx(found.errors.epe, abs=1e-4)
        assert float(row["bad_0_5"]) == pytest.approx(found.errors.bad_0_5, abs=1e-4)
        assert f"{found.errors.epe:.3f}" in shown
        assert (row["device"], row["dtype"]) == ("cpu", "float32")


def test_rows_state_how_the_network_was_used(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    evaluate_stereo(Red(), scenes, baseline="sgbm", enlarge=2, fill=True).write(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        used = {(row["model"], row["enlarge"], row["fill"]) for row in csv.DictReader(file)}
    assert used == {("sgbm", "1.0", "False"), ("sgbm_filled", "1.0", "False"), ("Red", "2", "True")}


def test_bad_scenes_are_named_and_the_rest_goes_on(scenes, capsys, monkeypatch):
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    (scenes / "two" / "im1.png").write_bytes(b"junk")
    scene(scenes / "three", [[np.inf, np.inf]], [[1.0, 2]])
    assert cli.main(["evaluate", "stereo", "--data", str(scenes), "--baseline", "sgbm"]) == 1
    told = capsys.readouterr()
    first, second = told.err.splitlines()
    assert first == f"visionattn: {scenes / 'three' / 'im0.png'}: No pixel to evaluate has ground truth."
    assert second.startswith(f"visionattn: Could not read the image {scenes / 'two' / 'im1.png'}")
    assert "one" in told.out


def test_wrong_input(scenes, monkeypatch):
    cases = [
        (lambda: evaluate_stereo([], scenes), ConfigError, "nothing to evaluate: give a model, or --baseline sgbm"),
        (lambda: evaluate_stereo([], scenes, baseline="bm"), ConfigError, "baseline must be one of 'sgbm'; got 'bm'"),
        (lambda: evaluate_stereo(Red(), scenes, dtype="int8"), ConfigError, "dtype must be one of .* got 'int8'"),
        (lambda: evaluate_stereo(nn.Linear(1, 1), scenes), InputError, "Linear cannot be used here: it states no task"),
        (
            lambda: evaluate_stereo("va_span_ch48_x4", scenes),
            InputError,
            "va_span_ch48_x4 cannot be used here: it is a 'restore' model",
        ),
        (lambda: evaluate_stereo(Red(), scenes / "none"), DataError, "There is no folder"),
        (lambda: evaluate_stereo(Red(), scenes, layout="pairs"), DataError, "in the layout pairs"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[images\]'"):
        evaluate_stereo([], scenes, baseline="sgbm")


def test_sgbm_finds_a_shift():
    wide = np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8)
    found = sgbm(wide[:, :-7], wide[:, 7:], 20)  # left x is right x - 7
    inside = found[5:-5, 45:-5]
    assert np.isfinite(inside).mean() > 0.95
    assert np.nanmedian(inside) == 7
    with pytest.raises(InputError, match=r"fails on 3 x 4 pixels with disparities up to 200\."):
        sgbm(wide[:3, :4], wide[:3, :4], 200)


def test_sgbm_has_its_measured_numbers_on_middlebury():
    folder = SHARED / "data/stereo"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    found = evaluate_stereo(
        [], [folder / "teddy", folder / "tsukuba"], factor={"teddy": 4, "tsukuba": 16}, baseline="sgbm"
    )
    bad = {(row.scene, row.region): row.errors.bad_2 for row in found.rows if row.model == "sgbm"}
    # Measured by another script.
    expected = {("teddy", "all"): 24.4, ("teddy", "nonocc"): 15.9, ("tsukuba", "all"): 5.3, ("tsukuba", "nonocc"): 3.3}
    assert bad == pytest.approx(expected, abs=0.06)
    filled = {row.scene: row.errors for row in found.rows if row.model == "sgbm_filled" and row.region == "all"}
    assert {scene: errors.density for scene, errors in filled.items()} == {"teddy": 100, "tsukuba": 100}
    assert filled["teddy"].bad_2 < 15
    assert filled["tsukuba"].bad_2 < 5.3


def test_filling_takes_the_farther_end_and_a_median():
    nan = np.nan
    rows = np.full((8, 9), 3.0)
    rows[:, 3:6], rows[:, 6:] = nan, 8  # a gap between what is far and what is near
    rows[:, 0] = nan
    rows[4] = nan
    found = fill(rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.tile(np.array(6 * [3.0] + 3 * [8.0]), (8, 1)))
    rows[1, 1] = 50  # which the median takes away
    np.testing.assert_array_equal(fill(rows), found)
    assert np.isnan(fill(np.full((4, 5), nan))).all()
    np.testing.assert_array_equal(fill(np.array([[nan, 2, nan, 1, nan]])), [[2, 2, 1, 1, 1]])


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), 1e12, 130, -1])
def test_disparities_that_semi_global_matching_cannot_look_through(largest):
    views = np.zeros((60, 130, 3), np.uint8)
    with pytest.raises(InputError, match=r"fails on 60 x 130 pixels with disparities up to .*check the ground truth"):
        sgbm(views, views, largest)


def test_the_factor_counts_for_png_of_16_bits(tmp_path, monkeypatch, capsys):
    """The same truth as a PNG of 64 times the disparity and as a PFM: the same errors, and what is assumed is told."""
    monkeypatch.setattr("visionattn.opening.load", lambda path: Red())
    (tmp_path / "net.pth").touch()
    truth = np.array([[8.0, 10.0], [20.0, 40.0]])
    for name in ("png", "pfm"):
        scene(tmp_path / name, truth, truth)
        for old, new in (("im0", "left"), ("im1", "right")):
            (tmp_path / name / f"{old}.png").rename(tmp_path / name / f"{new}.png")
        (tmp_path / name / "disp0.pfm").rename(tmp_path / name / "disp_left.pfm")
    (tmp_path / "png" / "disp_left.pfm").unlink()
    Image.fromarray((64 * truth).astype(np.uint16)).save(tmp_path / "png" / "disp_left.png")
    by_png, by_pfm = (evaluate_stereo(Red(), tmp_path / name, factor=64).rows[0].errors for name in ("png", "pfm"))
    assert by_png == by_pfm
    assert by_png.bad_0_5 == 0
    arguments = ["evaluate", "stereo", str(tmp_path / "net.pth"), "--data", str(tmp_path / "png")]
    assert cli.main(arguments) == 0
    assert "note: png: 16-bit disparities are divided by 256, as in KITTI." in capsys.readouterr().out
    for given in (["--factor", "64"], ["--factor", "png=64"]):
        assert cli.main([*arguments, *given]) == 0
        told = capsys.readouterr().out
        assert "note" not in told
        assert f"{by_png.epe:.3f}" in told
    assert cli.main([*arguments, "--factor", "jpg=64"]) == 2
    assert "no such scene: there are png." in capsys.readouterr().err
    assert cli.main([*arguments, "--factor", "png=64", "--factor", "4"]) == 2
    assert "SCENE=F once per scene" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--factor", "nan"], ["--factor", "inf"], ["--factor", "-4"], ["--factor", "a=0"], ["--enlarge", "1e6"]]
)
def test_numbers_that_make_no_sense(scenes, option, capsys):
    assert cli.main(["evaluate", "stereo", "--data", str(scenes), "--baseline", "sgbm", *option]) == 2
    told = capsys.readouterr().err
    assert f"argument {option[0]}: must be a finite number" in told
    assert told.count("\n") == 1


def test_results_that_are_not_finite_are_failures(scenes, capsys, monkeypatch):
    broken = Red()
    broken.gain.data.fill_(math.nan)
    found = evaluate_stereo([broken, Red()], scenes)
    assert found.rows == []
    assert len(found.failures) == 2
    assert all("The output of Red is not finite: its weights are damaged" in failure for failure in found.failures)
    monkeypatch.setattr("visionattn.opening.load", lambda path: broken)
    (scenes.parent / "net.pth").touch()
    assert cli.main(["evaluate", "stereo", str(scenes.parent / "net.pth"), "--data", str(scenes)]) == 1
    told = capsys.readouterr()
    assert "nan" not in told.out
    assert told.err.count("is not finite") == 2


def test_filling_does_not_hide_values_that_are_not_finite(scenes):
    class Spot(Red):
        def forward(self, left, right, start=None):
            found = super().forward(left, right).clone()
            found[..., :1, :1] = math.nan
            return found

    assert len(evaluate_stereo(Spot(), scenes, fill=True).failures) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("va_match_stereo_nano.nothing", "Leave out the part after the dot"),
        ("va_match_stereo_nan", "There is no model 'va_match_stereo_nan'"),
        ("va_span_ch26_x4", "it is a 'restore' model"),
        ("resnet18", "it states no task"),
    ],
)
def test_names_that_cannot_be_measured(scenes, capsys, name, message):
    assert cli.main(["evaluate", "stereo", name, "--data", str(scenes)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_names_of_scenes_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    names = ("[red]a", "[bold]b", b"\xff".decode("utf-8", "surrogateescape"))
    for name in names:
        scene(tmp_path / "data" / name, [[80.0, 80.0]], [[80.0, 80.0]])
    output = tmp_path / "out.csv"
    arguments = ["evaluate", "stereo", "--data", str(tmp_path / "data"), "--baseline", "sgbm", "--output", str(output)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "[red]a" in shown
    assert "[bold]b" in shown
    assert "\\udcff" in output.read_text("utf-8")
    assert cli.main(arguments) == 2
    assert "out.csv exists. Give --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_memory_that_ends_is_told(scenes, monkeypatch):
    def full(self, left, right, start=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Red, "forward", full)
    assert all(
        "pixels do not fit the memory: leave out --enlarge" in one for one in evaluate_stereo(Red(), scenes).failures
    )
