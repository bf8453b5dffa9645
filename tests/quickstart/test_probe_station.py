"""The probing station: what it writes, and that the backbone is ahead of pixels."""

from __future__ import annotations

import csv
import re

import pytest
from rich.console import Console

pytest.importorskip("skimage")
pytest.importorskip("lightning")

from visionattn import quickstart


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    quickstart.run(folder, ["probe"], Console(quiet=True))
    return folder / "probe"


def test_every_file_of_the_readme_is_there(station):
    readme = (station / "README.md").read_text()
    for name in re.findall(r"\| `([\w./]+)` \|", readme):
        assert (station / name).exists(), name
    assert "216 patches of left halves in `train/`, 216 of right halves in `val/`" in readme
    assert all(len(list((station / "photos" / split).rglob("*.png"))) == 216 for split in ("train", "val"))
    assert "<script" not in (station / "report/report.html").read_text()


def test_the_backbone_is_ahead_of_pixels(station):
    with open(station / "report/results.csv", newline="") as file:
        assert "cls" in {row["pooling"] for row in csv.DictReader(file)}
    readme = (station / "README.md").read_text()
    pixels, neighbours = map(float, re.search(r"k-NN ([\d.]+) % against ([\d.]+) %", readme).groups())
    assert neighbours > pixels + 30
