"""The notebooks run from top to bottom, without a network.

Their cells are plain Python without magics: a fresh namespace runs them as a kernel would, and Jupyter is not needed.
"""

import json
import socket
from pathlib import Path

import pytest
import torch

import visionattn

FOLDER = Path(visionattn.__file__).parent.parent / "docs" / "notebooks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a notebook asks for a network")

    def run(name):
        notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
        namespace = {}
        with torch.random.fork_rng(devices=[]):
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    assert cell["outputs"] == []
                    exec(compile("".join(cell["source"]), name, "exec"), namespace)
        return namespace

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return run


def test_every_notebook_is_run_here():
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert names == {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in names}


def test_block_into_a_timm_model(run):
    found = run("block_into_a_timm_model")
    assert torch.equal(found["before"], found["after"])
    assert found["losses"][-1] < found["losses"][0]
    assert found["gain"].abs().max() > 0


def test_judge_a_backbone(run, capsys):
    found = run("judge_a_backbone")
    trained, untrained = (found["accuracies"](found[name]) for name in ("trained", "untrained"))
    assert trained.keys() == untrained.keys() == {"gap", "ep_8", "k-NN"}
    assert trained["k-NN"] > untrained["k-NN"] + 0.05
    assert min(trained.values()) > 4 / 8  # chance is 1 / 8
    assert capsys.readouterr().out.count("Best head: ") == 2


def test_photograph_to_onnx(run):
    found = run("photograph_to_onnx")
    ours, bicubic = (found["psnr_y"](found[name], found["photo"], border=4) for name in ("large", "bicubic"))
    assert ours > bicubic + 0.5
    assert found["file"].path.name == "span.onnx"
    assert found["difference"] <= 1
