from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys

import numpy as np
import pytest
import timm
import torch

import visionattn
from visionattn.cli import main
from visionattn.errors import CheckpointError, InputError, MissingPackageError, UnknownNameError
from visionattn.export import OnnxModel, api, cli, write
from visionattn.export.cli import add_arguments, run

NANO = "va_minimal_vit_nano_patch7_28_minimum"


def export(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def test_name_without_weights(tmp_path, capsys):
    path = tmp_path / "new folder" / "nano [7].onnx"
    assert export(NANO, "--output", path, "--num-classes", 7, "--image-size", 28, 56, "--static-size") == 0
    printed = capsys.readouterr().out
    assert "Weights: random" in printed
    assert printed.count("pass") == 2
    assert "fixed to 28 x 56: as asked. The batch is dynamic: --batch N fixes it." in printed
    assert "step 1 of 3: tracing" in printed  # a log has a line a step
    file = OnnxModel(path)
    assert file.spec.weights == "random"
    assert file.spec.license == "not stated"
    assert file(torch.zeros(4, 1, 28, 56))[0].shape == (4, 7)
    # The last line is a command that works.
    code = printed.strip().splitlines()[-1].removeprefix("Next: python -c '").removesuffix("'")
    exec(code, {})
    assert "array([[" in capsys.readouterr().out


@pytest.mark.parametrize("by_name", [True, False])
def test_weights_from_a_file(by_name, tmp_path, capsys):
    model = timm.create_model(NANO, num_classes=2)
    torch.nn.init.normal_(model.head.weight)
    weights = tmp_path / "mine.pth"
    torch.save(model.state_dict(), weights)
    path = tmp_path / "nano.onnx"
    words = [NANO, "--checkpoint", weights, "--num-classes", 2] if by_name else [weights]
    assert export(*words, "--output", path, "--no-check", "--static-size") == 0
    assert "Not checked" in capsys.readouterr().out
    file = OnnxModel(path)
    assert file.spec.weights == "file mine.pth"
    images = torch.rand(1, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(file(images)[0]), model.eval()(images), rtol=1e-4, atol=1e-6)


def test_weights_from_a_folder(tmp_path, capsys):
    layer = {"depth": 1}
    model = timm.create_model(NANO, num_classes=2, **layer)
    torch.nn.init.normal_(model.head.weight)
    timm.models.save_for_hf(model, tmp_path / "folder", model_args=layer, safe_serialization=True)
    assert export(f"local-dir:{tmp_path / 'folder'}", "--output", tmp_path / "nano.onnx") == 0
    assert "random" not in capsys.readouterr().out.splitlines()[0]
    assert OnnxModel(tmp_path / "nano.onnx").spec.dynamic_axes == ["batch", "height", "width"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["va_minimal_vit_nano_patch7_27"], UnknownNameError, "There is no model .*patch7_28"),
        ([NANO + ".mnist"], UnknownNameError, "Invalid pretrained tag.*Leave out"),
        ([NANO, "--checkpoint", "absent.pth"], CheckpointError, "absent.pth"),
        ([NANO, "--checkpoint", __file__], CheckpointError, "test_export_cli.py"),
        ([__file__, "--num-classes", 3], InputError, "is a file with weights: leave out"),
        ([NANO, "--opset", 99], InputError, "operator set must be from 18 to .*; got 99"),
        ([NANO, "--image-size", 0, 28], InputError, "0 x 28"),
        ([NANO, "--image-size", 10**6, 10**6], InputError, "must be at least 1 x 1, .*; got 1000000 x 1000000"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(*words, "--output", tmp_path / "nano.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"visionattn\[export\]"):
        export(NANO, "--output", tmp_path / "nano.onnx")


def test_output_that_exists_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("visionattn.export.api.open_model", None)  # nothing is loaded before
    path = tmp_path / "nano.onnx"
    path.write_text("mine")
    os.mkfifo(tmp_path / "pipe.onnx")
    for output, message in (
        (path, "exists. Give --overwrite"),
        (tmp_path / "nano.tflite", "must end in .onnx"),
        (tmp_path, "must end in .onnx"),
        ("/dev/full", "must end in .onnx"),
        (tmp_path / "pipe.onnx", "not a regular file"),
    ):
        assert main(["export", NANO, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_both_files_of_a_pair_stay(tmp_path, capsys):
    (tmp_path / "pair.head.onnx").write_text("mine")
    assert main(["export", "va_cca_minimal_vit_nano_patch4_32", "--output", str(tmp_path / "pair.onnx")]) == 2
    assert "pair.head.onnx exists. Give --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pair.head.onnx"]


def test_overwriting_on_request_with_a_fixed_batch(tmp_path, capsys):
    path = tmp_path / "nano.onnx"
    path.write_text("old")
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    words = ["export", NANO, "--output", str(link), "--overwrite", "--static-size", "--batch", "1"]
    assert main(words) == 0
    assert link.is_symlink()
    assert "The batch is fixed to 1." in capsys.readouterr().out
    assert OnnxModel(path)(torch.zeros(1, 1, 28, 28))[0].shape == (1, 10)


def test_sigterm_leaves_no_file(tmp_path, capsys, monkeypatch):
    def terminate(*_):
        assert len(list(tmp_path.iterdir())) == 1  # the temporary file
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(write, "trace_graph", terminate)
    assert main(["export", NANO, "--output", str(tmp_path / "nano.onnx")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "visionattn: stopped by SIGTERM.\n"
    assert not list(tmp_path.iterdir())


def test_the_function_is_the_command(tmp_path):
    (file,) = visionattn.export(
        NANO, tmp_path / "net.onnx", num_classes=7, image_size=28, static_size=True, check=False
    )
    assert export(NANO, "--output", tmp_path / "command.onnx", "--num-classes", 7, "--input-size", 28, 28,
                  "--static-size", "--no-check") == 0  # fmt: skip
    images = np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)
    results = [OnnxModel(tmp_path / name)(images)[0] for name in ("net.onnx", "command.onnx")]
    assert file.path == tmp_path / "net.onnx"
    assert results[0].shape == (2, 7)
    np.testing.assert_array_equal(*results)


def test_defaults_are_those_of_the_command():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    options = {action.dest: action.default for action in parser._actions if action.help != argparse.SUPPRESS}
    parameters = {name: one.default for name, one in inspect.signature(api.export).parameters.items()}
    assert parameters.pop("check") is not options.pop("no_check")
    assert {name for name in options if name not in ("help", "bundle", "head")} == parameters.keys() - {"progress"}
    assert {name: options[name] for name in options.keys() & parameters.keys() - {"model", "output"}} == {
        name: value for name, value in parameters.items() if name in options.keys() - {"model", "output"}
    }
