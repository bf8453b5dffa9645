"""Old names of modules and arguments still work."""

import importlib

import pytest

from visionattn import evaluate_retrieval, evaluate_sr
from visionattn.errors import DataError, VisionAttnError
from visionattn.moved import MOVED, renamed_keywords


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


def test_arguments_by_their_old_names():
    @renamed_keywords(part="split")
    def asked(split="test"):
        return split

    assert asked("train") == asked(split="train") == "train"
    with pytest.warns(FutureWarning, match="The argument part is now split"):
        assert asked(part="val") == "val"


def test_old_arguments_of_measurements(tmp_path):
    with pytest.warns(FutureWarning, match="small_folder is now low_resolution"), pytest.raises(DataError):
        evaluate_sr([], tmp_path, small_folder=tmp_path)
    with pytest.warns(FutureWarning, match="part is now split"), pytest.raises(VisionAttnError):
        evaluate_retrieval([], tmp_path / "none.csv", part="val")
