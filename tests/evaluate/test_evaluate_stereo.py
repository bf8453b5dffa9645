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
from visionattn.data.disparity import write_disparity
from visionattn.errors import CheckpointError, ConfigError, DataError, InputError, MissingPackageError
from visionattn.evaluate import disparity_errors, stereo_matching
from visionattn.evaluate.sgbm import sgbm
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
    with pytest.raises(InputError, match="No pixel has truth there"):
        disparity_errors(found, truth, np.zeros((1, 3), bool))
    with pytest.raises(InputError, match=r"The disparity is \(2, 3\), and its truth \(1, 3\)"):
        disparity_errors(np.zeros((2, 3)), truth)


def test_a_folder(scenes):
    found = stereo_matching(Red(), scenes)
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
    monkeypatch.setattr("visionattn.evaluate.opening.load", lambda path: Red())
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    arguments = ["evaluate", "stereo", str(tmp_path / "net.pth"), "--data", str(scenes), "--baseline", "sgbm"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.csv")]) == 0
    shown = capsys.readouterr().out
    expected = stereo_matching(Red(), scenes)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"][-7:], row["scene"], row["region"]) for row in rows[:4]] == [
        ("sgbm", "one", "all"),
        ("net.pth", "one", "all"),
        ("sgbm", "one", "nonocc"),
        ("net.pth", "one", "nonocc"),
    ]
    own = [row for row in rows if row["model"].endswith("net.pth")]
    for row, found in zip(own, [*expected.rows, *expected.means()], strict=True):
        assert float(row["epe"]) == pytest.approx(found.errors.epe, abs=1e-4)
        assert float(row["bad_0_5"]) == pytest.approx(found.errors.bad_0_5, abs=1e-4)
        assert f"{found.errors.epe:.3f}" in shown
        assert (row["device"], row["dtype"]) == ("cpu", "float32")


def test_bad_scenes_are_named_and_the_rest_goes_on(scenes, capsys, monkeypatch):
    monkeypatch.setitem(BASELINES, "sgbm", lambda left, right, largest: np.full(left.shape[:2], largest))
    (scenes / "two" / "im1.png").write_bytes(b"junk")
    scene(scenes / "three", [[np.inf, np.inf]], [[1.0, 2]])
    assert cli.main(["evaluate", "stereo", "--data", str(scenes), "--baseline", "sgbm"]) == 1
    told = capsys.readouterr()
    first, second = told.err.splitlines()
    assert first == f"visionattn: {scenes / 'three' / 'im0.png'}: No pixel has truth there."
    assert second.startswith(f"visionattn: Could not read the picture {scenes / 'two' / 'im1.png'}")
    assert "one" in told.out


def test_wrong_input(scenes, monkeypatch):
    cases = [
        (lambda: stereo_matching([], scenes), ConfigError, "nothing to measure: name a model, or the baseline sgbm"),
        (lambda: stereo_matching([], scenes, baseline="bm"), ConfigError, "There is no baseline 'bm'"),
        (lambda: stereo_matching(Red(), scenes, dtype="int8"), ConfigError, "There is no dtype 'int8'"),
        (lambda: stereo_matching(nn.Linear(1, 1), scenes), ConfigError, "Linear does not match stereo pairs: its task"),
        (lambda: stereo_matching("va_span_ch48_x4", scenes), CheckpointError, "No weights are published for va_span"),
        (lambda: stereo_matching(Red(), scenes / "none"), DataError, "There is no folder"),
        (lambda: stereo_matching(Red(), scenes, layout="pairs"), DataError, "in the layout pairs"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[images\]'"):
        stereo_matching([], scenes, baseline="sgbm")


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
    found = stereo_matching([], [folder / "teddy", folder / "tsukuba"], baseline="sgbm")
    bad = {(row.scene, row.region): row.errors.bad_2 for row in found.rows}
    # Measured by another script.
    expected = {("teddy", "all"): 24.4, ("teddy", "nonocc"): 15.9, ("tsukuba", "all"): 5.3, ("tsukuba", "nonocc"): 3.3}
    assert bad == pytest.approx(expected, abs=0.06)
