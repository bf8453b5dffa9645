"""The README names what is there: commands, functions, weights and files."""

import re
from pathlib import Path

import pytest

import visionattn
from visionattn.cli import COMMANDS, TRAINING

ROOT = Path(visionattn.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_named_and_no_other():
    assert set(re.findall(r"`visionattn ([a-z]+)", README)) == {*COMMANDS, *TRAINING}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"visionattn\.([a-z_]+)[(`]", README))))
def test_function_exists(name):
    assert hasattr(visionattn, name)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_file_exists(link):
    assert (ROOT / link).exists()


def test_every_shipped_weight_is_named():
    shipped = {path.stem for path in (ROOT / "visionattn" / "weights").glob("*.safetensors")}
    assert {name for name in shipped if f"`{name}`" not in README} == set()


def test_both_commands_stand_first():
    indented = re.findall(r"^    (\S.*?)(?: {2,}#.*)?$", README, re.MULTILINE)
    assert indented[:2] == ["make quickstart", "make test"]
