"""The tour's stereo matching: what it tells is what its files hold, and the shipped network finds the motorcycle."""

import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from visionattn import quickstart
from visionattn.data.matching.disparity import read_disparity

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    quickstart.run(folder, ["stereo"], Console(record=True, width=160))
    return folder / "stereo"


def test_every_file_of_the_readme_is_there(station):
    named = set(re.findall(r"^\| `([\w.]+)`", (station / "README.md").read_text(), re.MULTILINE))
    assert {path.name for path in station.iterdir()} == named | {"README.md"}
    width, height = Image.open(station / "left.png").size
    assert Image.open(station / "compare.png").size == (2 * width + 4, 2 * (height + 28))


def test_errors_are_those_of_the_files(station):
    truth, network = (read_disparity(station / f"{name}.pfm") for name in ("truth", "network"))
    error = np.abs(network - truth)[np.isfinite(truth)]
    text = (station / "README.md").read_text()
    stated = dict(re.findall(r"^\| ([a-z -]+) \| ([\d.]+ \| [\d.]+) \|$", text, re.MULTILINE))
    epe, bad = map(float, stated["network"].split(" | "))
    assert epe == pytest.approx(error.mean(), abs=0.006)
    assert bad == pytest.approx(100 * (error > 2).mean(), abs=0.06)
    # The pair's own median as a constant answer is off by some 12 pixels.
    assert epe < 4
    shares = {name: float(row.split(" | ")[1]) for name, row in stated.items()}
    assert set(shares) == {"network", "semi-global matching", "filled semi-global matching"}
    assert shares["network"] < shares["semi-global matching"]
    # Which one is the best is what the numbers say.
    assert f"here the {min(shares, key=shares.get)} has" in " ".join(text.split())
