"""The command `visionattn check`."""

import json

import pytest

from tests.inspect import graphs
from visionattn.cli import main


@pytest.fixture
def path(tmp_path):
    return graphs.convolution(tmp_path / "conv.onnx", shape=[1, 3, 16, 16])


def test_text_and_json(path, tmp_path, capsys):
    assert main(["check", str(path), "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    for line in (
        "opset 17, IR 8, by other",
        "  in   image: float, 1 x 3 x 16 x 16",
        "  1 nodes, tensors of up to 4 axes: Conv 1",
        "Metadata: none",
        "  runs  16 x 16, batch 1: output 1 x 2 x 16 x 16",
        "  NNAPI: 1 of 1 nodes in 1 partition",
        "  2 threads: ",
        "No problems found.",
    ):
        assert line in printed
    assert json.loads((tmp_path / "found.json").read_text())["structure"]["operators"] == {"Conv": 1}
    assert main(["check", str(path), "--json", str(tmp_path / "found.json")]) == 2
    assert "exists. Give --overwrite" in capsys.readouterr().err


def test_problems_are_an_exit_code(tmp_path, capsys):
    assert main(["check", str(graphs.without_image(tmp_path / "a.onnx"))]) == 1
    assert "Problem: The file has no image input" in capsys.readouterr().out
