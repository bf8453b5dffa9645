"""The command: what it prints, and one clear message for a user's mistake."""

import pytest

from visionattn import models
from visionattn.cli import main


def test_list_shows_every_name(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in models.names() if name not in shown] == []


def test_list_takes_a_part_of_a_name(capsys):
    assert main(["list", "nano*minimum"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "va_" in line]
    assert [row[0] for row in rows] == [
        "va_minimal_vit_nano_patch4_32_minimum",
        "va_minimal_vit_nano_patch7_28_minimum",
    ]
    assert rows[1][1:] == ["classify", "0.03", "M", "0.7", "M", "1", "x", "28", "x", "28", "none"]


def test_show_is_a_card(capsys):
    assert main(["show", "va_minimal_vit_tiny_patch16_224_minimum"]) == 0
    shown = capsys.readouterr().out
    for fact in ("0.83 M", "3 x 224 x 224", "arXiv:2410.13732", "One matrix W_QK a block", "apache-2.0"):
        assert fact.lower() in shown.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "va_minimal_vit_nano"], "There is no model 'va_minimal_vit_nano'. Did you mean va_minimal_vit_nano_"),
        (["list", "resnet"], "No model name fits 'resnet'"),
        (["quickstart", "moon"], "There is no station 'moon'; there are classify"),
        (["export", "none.ckpt", "--output", "a.onnx"], "There is no model 'none.ckpt'."),
    ],
)
def test_mistakes_are_one_message(capsys, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_ctrl_c_is_told_in_words(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("visionattn.cli._list", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "visionattn: stopped.\n"
