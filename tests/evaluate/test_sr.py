"""The super-resolution protocol: its published numbers, its definition in loops, and what it says of bad pictures."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visionattn import cli
from visionattn.data.images import find_images, read_rgb
from visionattn.data.restore.bicubic import downscale, upscale
from visionattn.errors import CheckpointError, ConfigError, DataError, InputError, MissingPackageError
from visionattn.metrics.luma import luma

pytest.importorskip("skimage")

from visionattn.data.restore import bicubic as bicubic_file
from visionattn.evaluate import evaluate_sr, sr
from visionattn.evaluate.sr import ssim_y
from visionattn.metrics import luma as luma_file

SHARED = Path(__file__).parents[3] / "shared"


class Nearest(nn.Module):
    """Repeats pixels."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them grey and none a multiple of 2 or 3."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    y, x = np.mgrid[:47, :41] / 6.0
    for number, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        waves = [np.sin(x + y + number), np.sin(1.7 * x - y), np.cos(0.6 * x * y)]
        picture = np.stack([np.clip(127 + 110 * wave, 0, 255).astype(np.uint8) for wave in waves], axis=-1)
        Image.fromarray(picture[..., 0] if name == "c.bmp" else picture).save(folder / name)
    return folder


@pytest.mark.parametrize(("name", "psnr", "ssim"), [("Set5", 28.432, 0.8113), ("Set14", 26.093, 0.7049)])
def test_bicubic_has_its_published_numbers(name, psnr, ssim):
    folder = SHARED / "data/sr" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    # The published means were computed without rounding between rows and columns.
    for small in (None, folder / "LRbicx4"):
        found = evaluate_sr([], folder / "HR", scale=4, low_resolution=small)
        (mean,) = found.means()
        assert mean.psnr_y == pytest.approx(psnr, abs=0.005)
        assert mean.ssim_y == pytest.approx(ssim, abs=0.0005)


def test_a_published_network_has_its_measured_numbers():
    weights, folder = SHARED / "weights/span/team38_span_ch28_slim.pth", SHARED / "data/sr/Set5/HR"
    for path in (weights, folder):
        if not path.exists():
            pytest.skip(f"{path} is not on this machine")
    mean = evaluate_sr(weights, folder).means()[1]
    assert mean.psnr_y == pytest.approx(31.746, abs=0.001)
    assert mean.ssim_y == pytest.approx(0.8898, abs=0.0001)


def by_loops(first, second, border):
    """PSNR and SSIM, window by window."""
    y1, y2 = (luma(image)[border:-border, border:-border] for image in (first, second))
    psnr = 10 * math.log10(255**2 / np.mean((y1 - y2) ** 2))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(y1.shape[0] - 10):
        for left in range(y1.shape[1] - 10):
            a, b = (y[top : top + 11, left : left + 11] for y in (y1, y2))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return psnr, np.mean(values)


@pytest.mark.parametrize("scale", [2, 3])
def test_equals_the_definition(pictures, scale):
    found = evaluate_sr(Nearest(scale), pictures)
    assert found.failures == []
    assert [(row.model, row.picture) for row in found.rows] == [
        (model, name) for name in ("a.png", "b.jpg", "c.bmp") for model in ("bicubic", "Nearest")
    ]
    for bicubic, nearest in zip(found.rows[::2], found.rows[1::2]):
        large = read_rgb(pictures / nearest.picture)[: 47 // scale * scale, : 41 // scale * scale]
        small = downscale(large, scale)
        repeated = small.repeat(scale, axis=0).repeat(scale, axis=1)
        assert (nearest.psnr_y, nearest.ssim_y) == pytest.approx(by_loops(repeated, large, scale), rel=1e-9)
        expected = by_loops(upscale(small, scale), large, scale)
        assert (bicubic.psnr_y, bicubic.ssim_y) == pytest.approx(expected, rel=1e-9)
    means = found.means()
    assert [mean.model for mean in means] == ["bicubic", "Nearest"]
    assert means[1].psnr_y == pytest.approx(np.mean([row.psnr_y for row in found.rows[1::2]]))


def test_equal_pictures_have_ssim_one(pictures):
    picture = read_rgb(pictures / "a.png")
    assert ssim_y(picture, picture, 4) == pytest.approx(1)


def test_dtypes_and_the_callers_model(pictures):
    model = Nearest(2).train()
    found = {dtype: evaluate_sr(model, pictures, dtype=dtype).rows for dtype in ("float32", "float64", "bfloat16")}
    assert found["float32"] == found["float64"]
    assert found["bfloat16"][1].psnr_y == pytest.approx(found["float32"][1].psnr_y, abs=0.3)
    assert model.gain.dtype == torch.float32
    assert model.training


def test_several_models_have_several_names(pictures):
    found = evaluate_sr([Nearest(2), Nearest(2)], pictures)
    assert [mean.model for mean in found.means()] == ["bicubic", "Nearest", "Nearest (2)"]


def test_small_pictures_of_ones_own(pictures, tmp_path):
    (tmp_path / "small").mkdir()
    for path in find_images(pictures):
        small = downscale(read_rgb(path)[:46, :40], 2)
        Image.fromarray(small).save(tmp_path / "small" / f"{path.stem}x2.png")
    expected = evaluate_sr(Nearest(2), pictures).rows
    assert evaluate_sr(Nearest(2), pictures, low_resolution=tmp_path / "small").rows == expected
    Image.new("RGB", (5, 5)).save(tmp_path / "small/ax2.png")
    (failure,) = evaluate_sr(Nearest(2), pictures, low_resolution=tmp_path / "small").failures
    assert "ax2.png (5 x 5) must be 2 times smaller than" in failure
    assert "a.png (46 x 40)" in failure


def test_command(pictures, tmp_path, capsys):
    arguments = ["evaluate", "sr", "--data", str(pictures), "--scale", "2", "--output", str(tmp_path / "sr.csv")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    expected = evaluate_sr([], pictures, scale=2)
    with open(tmp_path / "sr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["a.png", "b.jpg", "c.bmp", "mean of 3"]
    for row, found in zip(rows, [*expected.rows, *expected.means()]):
        assert float(row["psnr_y"]) == pytest.approx(found.psnr_y, abs=1e-4)
        assert f"{found.psnr_y:.3f} / {found.ssim_y:.4f}" in shown
        assert (row["model"], row["scale"], row["device"], row["dtype"]) == ("bicubic", "2", "cpu", "float32")


def test_bad_pictures_are_named_and_the_rest_goes_on(pictures, tmp_path, capsys):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "broken.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (12, 12)).save(pictures / "tiny.png")
    assert cli.main(["evaluate", "sr", "--data", str(pictures), "--scale", "2"]) == 1
    told = capsys.readouterr()
    messages = told.err.splitlines()
    assert len(messages) == 2
    assert messages[0].startswith(f"visionattn: Could not read the image {pictures / 'broken.png'}: ")
    assert messages[1].startswith(f"visionattn: {pictures / 'tiny.png'}: An image of 12 x 12 pixels is too small for")
    assert "mean" in told.out
    assert "broken" not in told.out


def test_what_is_no_picture_is_told(pictures, capsys):
    (pictures / "a.heic").touch()
    assert cli.main(["evaluate", "sr", "--data", str(pictures), "--scale", "2"]) == 0
    assert "left out 1 with suffix .heic (a.heic)" in capsys.readouterr().err


def test_a_model_that_fails_is_told(pictures):
    broken = Nearest(2)
    broken.gain.data.fill_(math.nan)
    found = evaluate_sr(broken, pictures)
    assert found.rows == []
    assert [failure.endswith("contains values that are not finite.") for failure in found.failures] == [True] * 3


class Blur(nn.Module):
    """A convolution of radius 1, then pixels repeated: what tiles could get wrong shows at their seams."""

    def __init__(self, scale=2):
        super().__init__()
        self.scale, self.radius = scale, 1
        self.layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.layer.weight.data = torch.ones(3, 3, 3, 3) / 27

    def forward(self, x):
        return self.layer(x).repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def test_tiles_and_strips_change_nothing(pictures, monkeypatch):
    whole = evaluate_sr(Blur(2), pictures).rows
    sizes = []
    forward = Blur.forward
    monkeypatch.setattr(Blur, "forward", lambda self, x: sizes.append(tuple(x.shape[2:])) or forward(self, x))
    monkeypatch.setattr(sr, "SIDE", 9)
    monkeypatch.setattr(sr, "STRIP", 40 * 7)
    monkeypatch.setattr(luma_file, "STRIP", 40 * 5)
    monkeypatch.setattr(bicubic_file, "BLOCK", 100)
    tiled = evaluate_sr(Blur(2), pictures).rows
    assert max(max(size) for size in sizes) == 11
    assert len(sizes) == 3 * 9
    for one, other in zip(whole, tiled, strict=True):
        assert (one.model, one.picture) == (other.model, other.picture)
        assert (one.psnr_y, one.ssim_y) == pytest.approx((other.psnr_y, other.ssim_y), rel=1e-9)


def test_rows_that_are_finished_are_kept_when_the_run_ends(pictures, tmp_path, monkeypatch):
    class Fails(Nearest):
        count = 0

        def forward(self, x):
            Fails.count += 1
            if Fails.count == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        evaluate_sr(Fails(2), pictures, output=tmp_path / "sr.csv")
    with open(tmp_path / "sr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["picture"]) for row in rows][:4] == [
        (model, name) for name in ("a.png", "b.jpg") for model in ("bicubic", "Fails")
    ]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_lack_of_memory_costs_one_picture(pictures, error):
    class Fails(Nearest):
        def forward(self, x):
            if x.shape[2] * 2 == 46 and not done:
                done.append(1)
                raise error
            return super().forward(x)

    done = []
    found = evaluate_sr(Fails(2), pictures)
    assert len(found.failures) == 1
    assert found.failures[0].startswith(f"{pictures / 'a.png'}: ")
    assert [row.picture for row in found.rows] == ["b.jpg", "b.jpg", "c.bmp", "c.bmp"]


def test_an_output_that_exists_stays(pictures, tmp_path, capsys):
    (tmp_path / "sr.csv").write_text("mine")
    arguments = ["evaluate", "sr", "--data", str(pictures), "--scale", "2", "--output"]
    assert cli.main([*arguments, str(tmp_path / "sr.csv")]) == 2
    assert "exists. Give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "sr.csv").read_text() == "mine"
    assert cli.main([*arguments, str(tmp_path / "sr.txt")]) == 2
    assert cli.main([*arguments, str(tmp_path / "sr.csv"), "--overwrite"]) == 0
    assert (tmp_path / "sr.csv").read_text().startswith("model,scale,picture")


def test_names_that_are_no_utf_8(pictures, tmp_path):
    name = os.fsencode(pictures) + b"/\xff.png"
    with open(name, "wb") as file:
        file.write((pictures / "a.png").read_bytes())
    assert (
        cli.main(["evaluate", "sr", "--data", str(pictures), "--scale", "2", "--output", str(tmp_path / "a.csv")]) == 0
    )
    assert "\\udcff.png" in (tmp_path / "a.csv").read_text()


def test_wrong_input(pictures, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    cases = [
        (lambda: evaluate_sr([], tmp_path / "empty", scale=2), DataError, "There are no images in"),
        (lambda: evaluate_sr([], tmp_path / "none", scale=2), DataError, "There is no folder"),
        (lambda: evaluate_sr([], pictures), ConfigError, "Bicubic without a model needs a scale"),
        (lambda: evaluate_sr(Nearest(2), pictures, scale=3), ConfigError, "Nearest 2 and the requested 3"),
        (lambda: evaluate_sr([Nearest(2), Nearest(4)], pictures), ConfigError, r"Nearest 2, Nearest \(2\) 4"),
        (
            lambda: evaluate_sr(nn.Conv2d(3, 3, 1), pictures),
            ConfigError,
            "Conv2d is not a super-resolution model: it has no",
        ),
        (lambda: evaluate_sr([], pictures, scale=0), ConfigError, "at least 1; got 0"),
        (lambda: evaluate_sr([], pictures, scale=-2), ConfigError, "at least 1; got -2"),
        (
            lambda: evaluate_sr("va_match_stereo_nano", pictures),
            InputError,
            "it is a 'stereo' model; a 'restore' model is required",
        ),
        (
            lambda: evaluate_sr("va_span_ch48_x4", pictures),
            CheckpointError,
            "No weights are published for va_span",
        ),
        (lambda: evaluate_sr(Nearest(2), pictures, dtype="int8"), ConfigError, "dtype must be one of .* got 'int8'"),
        (
            lambda: evaluate_sr(Nearest(2), pictures, device="toaster"),
            InputError,
            "device 'toaster' cannot be used",
        ),
        (lambda: evaluate_sr(Nearest(2), pictures, low_resolution=pictures.parent), DataError, "no images in"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    monkeypatch.setitem(__import__("sys").modules, "skimage.metrics", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[images\]'"):
        evaluate_sr([], pictures, scale=2)


def test_jpeg_of_low_resolution_images(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    Image.fromarray(picture).save(tmp_path / "large/a.png")
    file = io.BytesIO()
    Image.fromarray(downscale(picture, 2)).save(file, "JPEG", quality=40)
    Image.open(file).save(tmp_path / "small/a.png")
    found = evaluate_sr([], tmp_path / "large", scale=2, jpeg=40)
    expected = evaluate_sr([], tmp_path / "large", scale=2, low_resolution=tmp_path / "small")
    assert found.rows == expected.rows
    assert found.jpeg == 40
    assert found.rows != evaluate_sr([], tmp_path / "large", scale=2).rows
    with pytest.raises(ConfigError, match="The JPEG quality must be from 1 to 100; got 0"):
        evaluate_sr([], tmp_path / "large", scale=2, jpeg=0)
