"""Packages that import their modules when a name is used, and packages that are called."""

import sys
import types

import pytest


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package `toy` with a callable sub-package `add`."""
    (tmp_path / "toy/add").mkdir(parents=True)
    (tmp_path / "toy/__init__.py").write_text(
        "from visionattn.lazy import lazily\n"
        "__getattr__ = lazily(__name__, {'add': 'toy.add', 'subtract': 'toy.numbers'})\n"
    )
    (tmp_path / "toy/numbers.py").write_text("def subtract(a, b): return a - b\n")
    (tmp_path / "toy/add/__init__.py").write_text(
        "from visionattn.lazy import make_callable\nmake_callable(__name__, 'toy.add.api')\n"
    )
    (tmp_path / "toy/add/api.py").write_text("def add(a, b=2): return a + b\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("toy")
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def test_names_are_imported_when_used(toy):
    assert "toy.numbers" not in sys.modules
    assert toy.subtract(3, 2) == 1
    with pytest.raises(AttributeError, match="module 'toy' has no attribute 'divide'"):
        _ = toy.divide


def test_a_package_is_called_as_its_function(toy):
    assert isinstance(toy.add, types.ModuleType)
    assert "toy.add.api" not in sys.modules
    assert toy.add(1) == 3
    assert toy.add(1, b=1) == 2
    assert toy.add.api.add is sys.modules["toy.add.api"].add
