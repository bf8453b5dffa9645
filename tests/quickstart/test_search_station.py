"""The search station: what it writes, and the numbers that its README says."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

pytest.importorskip("faiss")
pytest.importorskip("skimage")

from visionattn import quickstart
from visionattn.quickstart import search


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    quickstart.run(folder, ["search"], Console(quiet=True))
    return folder / "search"


def test_every_file_of_the_readme_is_there(station):
    readme = (station / "README.md").read_text()
    for name in re.findall(r"\| `([\w./]+)` \|", readme):
        assert (station / name).exists(), name
    assert len(list((station / "photos").glob("*.jpg"))) == 14 * 9 + 5
    for page in ("found.html", "duplicates.html"):
        assert "<script" not in (station / page).read_text()


def test_the_nearest_parts_are_of_the_same_photograph(station):
    hits = json.loads((station / "found.json").read_text())["hits"]
    assert hits[0]["image"].startswith("chelsea")
    readme = (station / "README.md").read_text()
    same, chance = map(int, re.search(r"(\d+) % are of the same photograph; by chance (\d+) %", readme).groups())
    assert same > 10 * chance


def test_copies_are_found_again(station):
    groups = json.loads((station / "duplicates.json").read_text())["groups"]
    pairs = [[f"{name}.jpg", f"{name}_copy.jpg"] for name in search.COPIED]
    assert sorted(groups) == sorted([*pairs, ["retina_0.jpg", "retina_2.jpg", "retina_6.jpg"]])  # its black corners
    readme = (station / "README.md").read_text()
    assert "Of the 5 copies, 5 are in a group with their original; other patches in the groups: 3." in readme
