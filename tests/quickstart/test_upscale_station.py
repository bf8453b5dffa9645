"""The tour's super-resolution: with weights it compares, without it says so."""

import re

import numpy as np
import timm
from PIL import Image
from rich.console import Console

from visionattn import quickstart
from visionattn.errors import CheckpointError
from visionattn.quickstart import upscale


def tour(folder):
    console = Console(record=True, width=160)
    quickstart.run(folder, ["upscale"], console)
    return console.export_text(), (folder / "upscale" / "README.md").read_text()


def test_with_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(upscale, "create_pretrained", lambda name: timm.create_model(name).eval())
    told, readme = tour(tmp_path)
    station = tmp_path / "upscale"
    named = set(re.findall(r"^\| `([\w.]+)`", readme, re.MULTILINE))
    assert {path.name for path in station.iterdir()} == named | {"README.md"}
    original, bicubic = (
        np.asarray(Image.open(station / f"{name}.png")).astype(float) for name in ("original", "bicubic")
    )
    expected = 10 * np.log10(255**2 / np.square(original - bicubic).mean())
    assert f"bicubic: {expected:.2f} dB" in told
    assert f"bicubic interpolation: {expected:.2f} dB" in readme
    assert Image.open(station / "small.png").size == (original.shape[1] // 4, original.shape[0] // 4)


def test_without_weights(tmp_path, monkeypatch):
    def absent(name):
        raise CheckpointError(f"No weights of {name} are there.")

    monkeypatch.setattr(upscale, "create_pretrained", absent)
    told, readme = tour(tmp_path)
    sentence = "This station has nothing to show yet. No weights of va_span_ch26_x4 are there."
    assert sentence in told
    assert sentence in readme


def test_as_shipped(tmp_path):
    told, _ = tour(tmp_path)
    assert "nothing to show yet" in told or "network: " in told
