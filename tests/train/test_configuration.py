"""Configurations are read within bounds, and refused in one short line."""

from __future__ import annotations

import importlib.util
import os

import pytest
import yaml

pytest.importorskip("lightning")

from visionattn.errors import ConfigError
from visionattn.train.cli import main
from visionattn.train.configuration import DEFAULT_RECIPE, check_numbers, check_text, missing_package, with_recipe

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join('*' + before for _ in range(9))}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "expand to more than 100,000 values"),
        ("model: " + "[" * 100_000, "nested too deeply"),
        ("model: &a {name: *a}", "names 'a', which contains itself or is missing"),
        ("x" * (2**20 + 1), "at most 1,048,576 characters; got 1,048,577"),
    ],
)
def test_texts_beyond_the_bounds(text, message):
    with pytest.raises(ConfigError, match=message):
        check_text(text)


def test_aliases_that_stand_for_little_are_read():
    check_text("a: &a {b: 1}\nc: *a\nd: [*a, *a]\n" + "# " + "x" * 500)


def test_nan_is_named():
    with pytest.raises(ConfigError, match=r"^model\.opt_args\.betas\[1\] must be a number; got nan\.$"):
        check_numbers({"model": {"init_args": {"opt_args": {"betas": [0.9, float("nan")]}}}})
    check_numbers({"trainer": {"gradient_clip_val": float("inf")}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer:\n  max_epochs: 1\n".encode("utf-16"), "given.yaml is not text in UTF-8: save it as UTF-8."),
        (BOMB.encode(), "given.yaml: The settings expand to more than 100,000 values, or are nested too deeply."),
        (b"- 1\n- 2\n", "given.yaml must hold settings, a YAML mapping; got a list."),
        (b"trainer: {max_epochs: [}", "given.yaml is not YAML: while parsing a flow node"),
        (None, "given.yaml is not a file of at most 1,048,576 bytes."),
    ],
)
def test_files_that_are_no_configuration(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    if content is None:
        os.mkfifo("given.yaml")
    else:
        (tmp_path / "given.yaml").write_bytes(content)
    assert main(["fit", "--config", "given.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"visionattn: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.num_nodes=-1"], "`num_nodes` must be a positive integer"),
        (["--trainer.accelerator=tpu"], "This needs the package 'torch_xla', which is not installed"),
        (["--model.mixup=.nan"], "model.mixup must be a number; got nan."),
        (["--model.mixup=-3"], "model.mixup and model.cutmix must be at least 0"),
        (["--model.lr=.inf"], "model.lr must be a finite number, at least 0; got inf."),
        (["--model.opt_args={betas: 5}"], "timm does not accept the settings of model.opt_args"),
        (["--model.sched_args={foo: 5}"], "timm does not accept the settings of model.sched_args"),
        (
            ["--model=os.system"],
            "'os.system' cannot be used. Import path does not correspond to a subclass",
        ),
        (["--trainer.logger=WandbLogger"], "This needs the package 'wandb', which is not installed: pip install wandb"),
        (["--trainer.callbacks+=BackboneFinetuning"], "The run could not start (AttributeError: 'ClassifyTask' object"),
        ([f"--model.name={'y' * 100_000}"], "There is no model 'yyyy"),
        (["--model.model_args.checkpoint_path=nowhere.pth"], "There is no file nowhere.pth"),
        (["--trainer.precision=7"], 'Parser key "trainer.precision": Expected a'),
    ],
)
def test_wrong_settings_are_one_short_line_and_leave_nothing(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    package = message.partition("needs the package '")[2].partition("'")[0]
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert main(["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *options]) == 2
    error = capsys.readouterr().err.removeprefix("visionattn: ")
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 600
    assert list(tmp_path.rglob("*")) == []


def test_missing_packages_are_named():
    assert missing_package(ModuleNotFoundError("x", name="wandb.sdk")).endswith("pip install wandb")
    assert missing_package(ImportError("Requirement 'comet-ml>=3.44' not met.")).endswith("pip install comet-ml")
    assert missing_package(ValueError("no")) is None


def test_a_folder_without_a_recipe_gets_the_recipe_for_folders(tmp_path, monkeypatch, capsys):
    assert with_recipe(["fit", "--data.root", "x"]) == ["fit", "--config", DEFAULT_RECIPE, "--data.root", "x"]
    for args in (["fit"], ["fit", "--data.root=x", "--data.dataset=folder"], ["fit", "--data.root=x", "--config=y"]):
        assert with_recipe(args) == args
    assert with_recipe(["predict", "--data.root=x"]) == ["predict", "--data.root=x"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    assert main(["fit", "--data.root=pictures", "--print_config"]) == 0
    note, _, config = capsys.readouterr().out.partition("\n")
    assert note == f"No recipe is given: using {DEFAULT_RECIPE}, for images in one folder per class."
    assert yaml.safe_load(config)["trainer"]["max_epochs"] == 6
