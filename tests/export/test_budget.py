"""One time limit for all steps of an export, and what is written when it cuts the check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from rich.console import Console

import visionattn
from tests.export.clock import Clock, count_pixels
from tests.export.test_check import Turned
from tests.export.toys import OneSize, Toy
from visionattn.cli import main
from visionattn.errors import ExportError, InputError
from visionattn.export import OnnxModel, export_onnx
from visionattn.export import bundle as bundles
from visionattn.export import cli as command
from visionattn.export.budget import Budget
from visionattn.export.check import check_file
from visionattn.export.program import write_program
from visionattn.export.rows import CheckRow

NANO = "va_minimal_vit_nano_patch7_28_minimum"


def test_time_is_what_has_passed_since_the_start():
    clock, lines = Clock(), []
    clock.seconds = 1000.0
    budget = Budget(100, lines.append, clock)
    assert budget.allows(100)
    clock.seconds += 70
    assert budget.spent == 70
    assert budget.allows(30)
    assert not budget.allows(31)
    assert Budget().allows(1e9)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "9", None])
def test_limit_is_a_time(tmp_path, limit):
    with pytest.raises(InputError, match=r"^time_limit must be a number of seconds above 0; got .+\.$"):
        export_onnx(Toy(), tmp_path / "model.onnx", time_limit=limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "told"), [(0.5, " of at most 0.5 s"), (1e6, " of at most 1,000,000 s"), (1e400, "")])
def test_limit_is_told_as_it_is(limit, told):
    lines = []
    Budget(limit, lines.append, Clock()).tell_time("A", True)
    assert lines == [f"A: 0 s{told} of CPU time so far."]


def test_lines_come_every_ten_seconds_and_where_they_must():
    clock, lines = Clock(), []
    budget, free = Budget(2000, lines.append, clock), Budget(tell=lines.append, clock=clock)
    for seconds, must in ((0, False), (9, False), (1, False), (5, False), (1, True), (9, False), (1475, False)):
        clock.seconds += seconds
        budget.tell_time("A", must)
    free.tell_time("B", False)
    assert lines == [
        *(f"A: {passed} s of at most 2,000 s of CPU time so far." for passed in ("0", "10", "16", "1,500")),
        "B: 1,500 s of CPU time so far.",
    ]


def test_cut_check_says_what_it_left_out(tmp_path, monkeypatch):
    count_pixels(monkeypatch)
    lines = []
    file = export_onnx(Toy(), tmp_path / "model.onnx", time_limit=9000, progress=lines.append)
    # 4 images of 53 x 19, and as many of 19 x 53, take 8056 s, 4 of 32 x 32 would take 4096.
    assert [(row.batch, row.height, row.width) for row in file.rows] == [
        (b, *s) for s in ((53, 19), (19, 53)) for b in (1, 3)
    ]
    assert all(row.passed for row in file.rows)
    assert file.spec.unchecked == ["32 x 32"]
    opened = OnnxModel(tmp_path / "model.onnx")
    assert opened.spec == file.spec
    assert opened.session.get_modelmeta().custom_metadata_map["unchecked"] == '["32 x 32"]'
    assert opened(torch.rand(2, 3, 20, 44))[0].shape == (2, 3)
    onnx.checker.check_model(str(file.path), full_check=True)
    assert "All steps may take 9,000 s of CPU time." in lines[0]
    assert lines[2:] == [
        "Step 3 of 3: comparing the file with PyTorch at 3 sizes.",
        "Comparison 1 of 6, 53 x 19, batch 1: 0 s of at most 9,000 s of CPU time so far.",
        "Comparison 2 of 6, 53 x 19, batch 3: 1,007 s of at most 9,000 s of CPU time so far.",
        "Comparison 3 of 6, 19 x 53, batch 1: 4,028 s of at most 9,000 s of CPU time so far.",
        "Comparison 4 of 6, 19 x 53, batch 3: 5,035 s of at most 9,000 s of CPU time so far.",
        "The time limit does not suffice for the other sizes, which take 4,096 s by estimate.",
    ]


def test_complete_and_absent_checks_say_so_too(tmp_path):
    assert export_onnx(Toy(), tmp_path / "a.onnx").spec.unchecked == []
    assert OnnxModel(tmp_path / "a.onnx").spec.unchecked == []
    export_onnx(Toy(), tmp_path / "b.onnx", check=False)
    assert OnnxModel(tmp_path / "b.onnx").spec.unchecked == ["32 x 32", "53 x 19", "19 x 53"]


def test_without_time_for_one_size_there_is_no_file(tmp_path, monkeypatch):
    clock = count_pixels(monkeypatch)
    with pytest.raises(ExportError) as error:
        export_onnx(Toy(), tmp_path / "model.onnx", time_limit=4000)
    assert str(error.value) == (
        "The check of Toy cannot compare a single size, 53 x 19, within the time limit of 4,000 s of CPU time for all "
        "steps: 1,007 s have passed. Raise the limit with --time-limit (time_limit=); a file outside a bundle can also "
        "do without a check, with --no-check (check=False)."
    )
    assert clock.seconds == 53 * 19
    with pytest.raises(ExportError, match="cannot compare a single size, 8 x 8"):
        export_onnx(OneSize(), tmp_path / "model.onnx", time_limit=4 * 64 - 1)
    assert not list(tmp_path.iterdir())


def test_difference_is_not_passed_for_lack_of_time(tmp_path, monkeypatch):
    """Rounding may have caused it, but there is no time to try other images."""
    clock = count_pixels(monkeypatch)
    file = OnnxModel(export_onnx(Turned(True), tmp_path / "model.onnx", check=False).path)
    wrong = Turned(True, calls=2, columns=30)  # for the first images only
    assert not check_file(wrong, file, Budget(20_000, clock=clock)).unchecked
    with pytest.raises(ExportError) as error:
        check_file(wrong, file, Budget(8000, clock=clock))
    assert str(error.value).startswith("The outputs of the exported file differ from those of Turned: map at 53 x 19, ")
    assert str(error.value).endswith("no time to try other images: raise it with --time-limit (time_limit=).")


def test_cut_check_of_a_program(tmp_path, monkeypatch):
    count_pixels(monkeypatch)
    file = write_program(Toy(), tmp_path / "model.pt2", time_limit=5000)
    assert len(file.rows) == 1
    assert file.spec.unchecked == ["32 x 32", "19 x 53"]
    extra = {"visionattn.json": ""}
    program = torch.export.load(file.path, extra_files=extra).module()
    assert json.loads(json.loads(extra["visionattn.json"])["unchecked"]) == file.spec.unchecked
    images = torch.rand(4, 3, 20, 44)
    torch.testing.assert_close(program(images), Toy()(images))


def test_command_with_a_cut_check_says_so_and_fails(tmp_path, monkeypatch, capsys):
    count_pixels(monkeypatch)
    words = ["export", NANO, "--output", str(tmp_path / "nano.onnx")]
    assert main([*words, "--time-limit", "4000"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("pass") == 4
    assert "Not checked: 47 x 17." in printed
    assert (
        "Checked in part: within 4,000 s of CPU time, these were not compared with PyTorch: 47 x 17. Raise the limit "
        "with --time-limit, or check smaller sizes with --image-size."
    ) in printed
    assert "one fixed size" not in printed
    assert OnnxModel(tmp_path / "nano.onnx").spec.unchecked == ["47 x 17"]
    assert main([*words, "--overwrite", "--time-limit", "8000"]) == 0
    assert "Checked in part" not in capsys.readouterr().out


def test_command_tells_which_outputs_of_a_pair_were_not_compared(capsys):
    files = [
        SimpleNamespace(
            path=Path(f"{name}.onnx"),
            rows=[CheckRow(name, 1, 8, 8, (0.0,), 1.0, 1e-4)],
            bytes=1,
            nodes=1,
            seconds=1,
            spec=SimpleNamespace(
                output_names=[name],
                unchecked=unchecked,
                input_size=(3, 8, 8),
                dynamic_size=True,
                opset=20,
                dynamic_axes=[],
            ),
        )
        for name, unchecked in (("tokens", []), ("embeddings", ["9 x 9", "8 x 16"]))
    ]
    command._tell(SimpleNamespace(time_limit=0.5), files, Console(width=200))
    printed = capsys.readouterr().out
    assert "Not checked: embeddings at 9 x 9, embeddings at 8 x 16." in printed
    assert "within 0.5 s of CPU time, these were not compared with PyTorch: embeddings at 9 x 9, embeddings" in printed


def test_bundle_is_checked_completely_or_not_written(tmp_path, monkeypatch):
    file = export_onnx(Toy(), tmp_path / "model.onnx")
    cut = SimpleNamespace(spec=replace(file.spec, unchecked=["53 x 19", "32 x 32"]))
    monkeypatch.setattr(bundles, "export", lambda *_, **__: (cut,))
    with pytest.raises(
        ExportError, match=r"the check at 53 x 19, 32 x 32 does not end within 900 s of CPU time: raise"
    ):
        visionattn.export_bundle(Toy(), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_variants_keep_what_was_not_checked(tmp_path, monkeypatch):
    count_pixels(monkeypatch)
    (file,) = visionattn.export(NANO, tmp_path / "nano.onnx", fp16=True, time_limit=4000)
    assert [variant.path.name for variant in file.variants] == ["nano.onnx", "nano.fp16.onnx"]
    for variant in file.variants:
        assert OnnxModel(variant.path).spec.unchecked == file.spec.unchecked == ["47 x 17"]
