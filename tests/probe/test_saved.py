"""Files of tensors: a changed bit is found, or changes nothing."""

import random

import pytest
import torch

from visionattn.errors import DataError
from visionattn.files import write_state
from visionattn.probe.saved import read_state


def test_a_changed_bit_is_found_or_changes_nothing(tmp_path):
    content = {"a": torch.arange(50.0), "b": [1, 2.5, "text"]}
    path = tmp_path / "state.pt"
    write_state(path, content)
    whole = path.read_bytes()
    found = 0
    for place in random.Random(0).sample(range(len(whole)), 150):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            again = read_state(path)
        except DataError:
            found += 1
            continue
        assert torch.equal(again["a"], content["a"])
        assert again["b"] == content["b"]
    assert found > 50


def test_other_files_are_refused(tmp_path):
    torch.save({"code": print}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "folder.pt").mkdir()
    for name in ("code", "text", "folder", "none"):
        with pytest.raises(DataError, match=f"{name}.pt"):
            read_state(tmp_path / f"{name}.pt")
