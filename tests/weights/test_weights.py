"""Reading weight files: wrappers, prefixes, and files that must be refused."""

import pytest
import torch
from safetensors.torch import save_file

from visionattn import weights
from visionattn.errors import CheckpointError
from visionattn.weights.hashing import hash_state

STATE = {"a.weight": torch.ones(2), "b.bias": torch.zeros(3)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"params_ema": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net._orig_mod."])
def test_wrappers_and_prefixes(wrap, prefix):
    wrapped = wrap({prefix + key: value for key, value in STATE.items()})
    assert list(weights.unwrap(wrapped)) == list(STATE)


def test_both_formats(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert torch.equal(weights.read(tmp_path / name)["a.weight"], STATE["a.weight"])


class Code:
    """What a pickle must not bring to life."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "There is no file"),
        ("text.pt", b"hello", "not a checkpoint of tensors|Could not read"),
        ("cut.safetensors", b"\x10", "Could not read"),
        ("code.pt", Code, "nothing else is loaded"),
        ("list.pt", [1, 2], "holds a list"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is Code:
        torch.save(Code(), tmp_path / name)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        weights.read(tmp_path / name)


def test_no_weights_in_it():
    with pytest.raises(CheckpointError, match="holds no weights; its entries are epoch"):
        weights.unwrap({"epoch": 3})


def test_mismatches_are_named():
    found = {"a.weight": torch.ones(3), "c": torch.ones(1)}
    assert weights.mismatches(found, STATE) == ["b.bias is missing", "c is unknown", "a.weight is (3,), not (2,)"]


def test_hash_of_a_state_sees_values_and_not_memory_layouts():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    first = hash_state(model.state_dict())
    assert hash_state(model.to(memory_format=torch.channels_last).state_dict()) == first
    model[1].bias.data[3] += 1
    assert hash_state(model.state_dict()) != first
