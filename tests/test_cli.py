"""The command: what it prints, and one clear message for a user's mistake."""

import shutil
import subprocess
import sys

import pytest
import torch

import visionattn
from tests.forking import run
from visionattn import models
from visionattn.cli import main


def test_list_shows_every_name(capsys, monkeypatch):
    monkeypatch.setattr("visionattn.zoo.create", None)  # no model is built
    assert main(["list"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if "va_" in line}
    assert list(rows) == models.names()
    assert {name: row[-1] for name, row in rows.items() if row[-1] != "none"} == WEIGHTS


WEIGHTS = {
    "va_cca_halonet_nano_32": "shipped",
    "va_halonet_nano_32": "shipped",
    "va_match_flow_base": "download",
    "va_match_flow_nano": "shipped",
    "va_match_stereo_base": "download",
    "va_match_stereo_nano": "shipped",
    "va_match_stereo_small": "download",
    "va_match_stereo_tiny": "download",
    "va_minimal_vit_micro_patch4_32": "shipped",
    "va_minimal_vit_micro_patch4_32_ep": "shipped",
    "va_mobilenetv2_ulsam_050_32": "shipped",
    "va_span_ch26_x2": "shipped",
    "va_span_ch26_x3": "shipped",
    "va_span_ch26_x4": "shipped",
}


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
    for fact in ("0.83 M", "3 x 224 x 224", "arXiv:2410.13732", "One matrix W_QK per block", "apache-2.0"):
        assert fact.lower() in shown.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "va_minimal_vit_nano"], "There is no model 'va_minimal_vit_nano'. Did you mean va_minimal_vit_nano_"),
        (["list", "resnet"], "No model name fits 'resnet'"),
        (["quickstart", "moon"], "station must be one of 'classify'"),
        (["export", "none.ckpt", "--output", "a.onnx"], "There is no file none.ckpt."),
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

    monkeypatch.setattr("visionattn.zoo.run_list", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "visionattn: stopped.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND. See visionattn --help."),
        (["bogus"], "invalid choice: 'bogus'"),
        (["export", "--opset", "two"], "argument --opset: invalid int value: 'two'. See visionattn export --help."),
        (["list", "a", "b" * 10**6], "unrecognized arguments: bbb"),
    ],
)
def test_errors_of_the_parser_are_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert len(told) < 1100


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "standard output, or an open file: No space left on device."),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied."),
        (OSError("cannot identify it"), "standard output, or an open file: cannot identify it."),
        (MemoryError(), "There is not enough memory for this."),
        (RuntimeError("... DefaultCPUAllocator: can't allocate memory ..."), "There is not enough memory for this."),
        (torch.OutOfMemoryError("CUDA out of memory"), "There is not enough memory for this."),
    ],
)
def test_faults_of_the_machine_are_one_line(capsys, monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr("visionattn.zoo.run_list", fail)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == f"visionattn: {message}\n"


STREAMS = """
import os, sys
for descriptor in map(int, sys.argv[1].split()):
    os.close(descriptor)
sys.stdout = None if "1" in sys.argv[1] else sys.stdout
if sys.argv[2]:
    os.dup2(os.open(sys.argv[2], os.O_WRONLY), 1)
from visionattn import cli, zoo
zoo.run_list = lambda args: print("naïve " + "x" * 10_000) or 0
code = cli.main(["list"])
first = os.open(os.devnull, os.O_RDONLY)  # no file gets the number of a standard stream
os.write(2, f"code {code}, number {first > 2}".encode())
"""


@pytest.mark.parametrize(
    ("closed", "target", "told"),
    [
        ("0 1", "", "code 0, number True"),
        (
            "",
            "/dev/full",
            "visionattn: standard output, or an open file: No space left on device.\ncode 2, number True",
        ),
    ],
)
def test_streams_that_take_nothing(closed, target, told):
    done = run(STREAMS, ("-c", closed, target), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.stderr == told
    assert done.returncode == 0


def test_show_prints_the_card_of_shipped_weights_and_names_others(capsys):
    assert main(["show", "va_span_ch26_x4.real"]) == 0
    shown = capsys.readouterr().out
    table, _, card = shown.partition("└")
    assert "shipped (real)" in table
    assert "va_span_ch26_x4.wallpapers" in table
    assert 'create_model("va_span_ch26_x4.real", pretrained=True)' in table
    for part in ("Data:", "Command:", "Measured:", "Licence:"):
        assert part in card


def test_show_takes_names_of_timm(capsys):
    assert main(["show", "test_resnet"]) == 0
    shown = capsys.readouterr().out
    for fact in ("test_resnet", "classify", "3 x 160 x 160", "not stated"):
        assert fact in shown


def completed(folder, *words):
    """What bash offers for the last of some words."""
    line = f"""
        source completion.sh
        COMP_WORDS=({" ".join(map(repr, words))}); COMP_CWORD={len(words) - 1}; COMP_LINE={" ".join(words)!r}
        _shtab_visionattn 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=folder).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    (tmp_path / "photo.png").touch()
    assert completed(tmp_path, "visionattn", "ev") == ["evaluate"]
    assert completed(tmp_path, "visionattn", "upscale", "--engine", "on") == ["onnxruntime"]
    assert completed(tmp_path, "visionattn", "upscale", "pho") == ["photo.png"]


def test_the_version_is_told_at_once():
    code = "import sys; sys.argv[1:] = ['--version']; import visionattn_command; code = visionattn_command.main(); "
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"visionattn {visionattn.__version__}\n")
