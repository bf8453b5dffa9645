"""Where runs write: a folder for each pair of weights and data, no report replaced unasked, one writer."""

import json
import re
import shlex
import shutil

from safetensors.torch import save_file

from tests.probe.runs import NAME, tiny
from visionattn.checkpoints import create
from visionattn.cli import main
from visionattn.files import exclusive


def test_a_report_of_another_run_is_not_replaced(images, done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path / "out")
    before = (out / "results.json").read_bytes()
    assert main(tiny(images, out, "--lrs", "0.2")) == 2
    told = capsys.readouterr().err
    assert "contains the report of another run" in told
    assert "--overwrite" in told
    assert (out / "results.json").read_bytes() == before
    assert main(tiny(images, out, "--lrs", "0.2", "--overwrite")) == 0
    content = json.loads((out / "results.json").read_text())
    assert [row["lr"] for row in content["heads"] if row["method"] == "head"] == [0.2]
    assert "--overwrite" not in content["command"]
    assert main(shlex.split(content["command"])[1:]) == 0  # the same plan
    (out / "results.json").write_text("{")
    assert main(tiny(images, out, "--lrs", "0.2")) == 2
    assert "a report that cannot be read" in capsys.readouterr().err
    own = tmp_path / "own"
    own.mkdir()
    (own / "report.md").write_text("mine")
    assert main(tiny(images, own)) == 2
    assert "contains a file report.md" in capsys.readouterr().err
    assert (own / "report.md").read_text() == "mine"


def test_by_default_each_pair_of_weights_and_images_has_its_folder(images, done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(create(NAME, num_classes=0).state_dict(), "best.safetensors")
    other = shutil.copytree(images, tmp_path / "other")
    for root, weights in ((images, "--random"), (other, "--random"), (images, "best.safetensors")):
        for _ in range(2):
            assert main(tiny(root, None, weights=weights)) == 0
    folders = sorted((tmp_path / "runs/probe").iterdir())
    assert len(folders) == 3
    assert all(re.fullmatch(NAME + r"-folder-[0-9a-f]{8}", folder.name) for folder in folders)
    # A folder named by an earlier version goes on where it is of these weights and images.
    shutil.rmtree(tmp_path / "runs")
    old = tmp_path / "runs" / "probe" / f"{NAME}-folder"
    assert main(tiny(images, old)) == 0
    shutil.copy(done / "results.json", old / "results.json")
    assert main(tiny(images, None)) == 0
    assert [folder.name for folder in old.parent.iterdir()] == [old.name]


def test_a_second_run_in_the_folder_is_refused(images, tmp_path, capsys):
    with exclusive(tmp_path / "out"):
        assert main(tiny(images, tmp_path / "out")) == 2
    assert "Another run is writing to" in capsys.readouterr().err
