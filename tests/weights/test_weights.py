"""Reading weight files: wrappers, prefixes, and files that must be refused."""

import zipfile

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
        ("text.pt", b"hello", "must contain only tensors|Could not read"),
        ("cut.safetensors", b"\x10", "Could not read"),
        ("code.pt", Code, "must contain only tensors and plain types"),
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


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.randn(1000)}, path)
    content = bytearray(path.read_bytes())
    for place in range(1000, 4000, 500):
        content[place] ^= 16
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged|Could not read"):
            weights.read(path)
        content[place] ^= 16
    path.write_bytes(content)
    assert len(weights.read(path)["a"]) == 1000


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(weights.read(tmp_path / "w.pt")["a.weight"], STATE["a.weight"])


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"")
        archive.writestr("bomb/data/0", bytes(100_000_000))
    with pytest.raises(CheckpointError, match=r"has 0.1 MB and would unpack to 100.0 MB"):
        weights.read(tmp_path / "bomb.pth")


def test_endless_wrappers_and_strange_tensors():
    endless = {"epoch": 1}
    endless["state_dict"] = endless
    with pytest.raises(CheckpointError, match="holds no weights"):
        weights.unwrap(endless)
    for strange in (torch.ones(2, 2).to_sparse(), torch.ones(1).expand(10**9), torch.ones(1, device="meta")):
        with pytest.raises(CheckpointError, match=r"tensors that are not plain: b\.bias"):
            weights.unwrap({**STATE, "b.bias": strange})
    assert list(weights.unwrap({**STATE, 3: torch.ones(1), b"x": torch.ones(1)})) == list(STATE)


def test_averaged_weights_come_first_as_timm_has_it():
    averaged = {"a": torch.zeros(1)}
    assert weights.unwrap({"state_dict": {"a": torch.ones(1)}, "state_dict_ema": averaged}) == averaged


def test_whole_numbers_are_no_weights_and_counters_may_be_missing():
    wanted = {"a": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)}
    assert weights.mismatches({"a": torch.ones(2)}, wanted) == []
    assert weights.mismatches({"a": torch.ones(2, dtype=torch.int8)}, wanted) == ["a is int8, not float32"]
    assert weights.mismatches({"a": torch.ones(2, dtype=torch.bool)}, wanted) == ["a is bool, not float32"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value):
    own = {"a": torch.ones(2), "mask": torch.tensor([0.0, float("-inf")])}
    weights.check_values(own, own, "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt holds NaN or infinite values, .*: a\. Use an earlier"):
        weights.check_values({"a": torch.tensor([1.0, value])}, own, "x.pt")
