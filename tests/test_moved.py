"""Old names of modules still import."""

import importlib

import pytest

from visionattn.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_imports_and_says_the_new_one(old, new):
    with pytest.warns(FutureWarning, match=f"{old} is now {new}"):
        module = importlib.reload(importlib.import_module(old))
    now = importlib.import_module(new)
    assert [name for name in now.__all__ if getattr(module, name) is not getattr(now, name)] == []


def test_a_function_that_is_called_otherwise_now(recwarn):
    from visionattn.data.pictures import find_pictures

    from visionattn.data.images import find_images

    assert find_pictures is find_images


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"visionattn\.data\.nothing"):
        importlib.import_module("visionattn.data.nothing")
