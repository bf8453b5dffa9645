"""A bundle that is as its card says, and every way in which one is not."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from visionattn_runtime import RunError, load, verify
from visionattn_runtime.verify import sample_error


@pytest.fixture
def bundle(files, photo, tmp_path):
    """The least that is a bundle."""
    folder = tmp_path / "bundle"
    (folder / "sample").mkdir(parents=True)
    shutil.copyfile(files["Labelled"], folder / "toy.onnx")
    Image.fromarray(photo).save(folder / "sample" / "input.png")
    model = load(folder / "toy.onnx")
    np.save(folder / "sample" / "expected.npy", model.predict(photo))
    paths = [path for path in folder.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    card = {
        "format": 1,
        "files": {name: {"sha256": digest} for name, digest in digests.items()},
        "sample": {"images": ["sample/input.png"], "expected": "sample/expected.npy"},
        "variants": [{"file": "toy.onnx", "metadata": model.texts, "allowed": 1e-6}],
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def edit(folder, change):
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def failures(folder):
    return [(row.file, row.finding) for row in verify(folder) if not row.passed]


def test_what_holds(bundle):
    rows = verify(bundle)
    assert all(row.passed for row in rows)
    assert [row.file for row in rows].count("toy.onnx") == 3
    assert rows[-1].finding == "computes the sample to 0 of PyTorch's result; 1e-06 is allowed"


def test_changed_file(bundle):
    with open(bundle / "toy.onnx", "ab") as file:
        file.write(b"\0\0")
    found = failures(bundle)
    assert ("toy.onnx", "has changed: its SHA-256 is another") in found


def test_missing_and_further_files(bundle):
    (bundle / "sample" / "expected.npy").unlink()
    shutil.copyfile(bundle / "toy.onnx", bundle / "other.onnx")
    found = dict(failures(bundle))
    assert found["sample/expected.npy"] == "cannot be read: No such file or directory"
    assert found["other.onnx"] == "is not in the card"
    assert "No such file" in found["toy.onnx"]


def test_other_metadata(bundle):
    def change(card):
        card["variants"][0]["metadata"] |= {"license": "mit", "further": "1"}

    edit(bundle, change)
    assert failures(bundle) == [("toy.onnx", "has other metadata than the card: further, license")]


def test_other_results(bundle):
    expected = np.load(bundle / "sample" / "expected.npy")
    np.save(bundle / "sample" / "expected.npy", expected + np.float32(0.001))
    found = dict(failures(bundle))
    assert found["toy.onnx"] == "computes the sample to 0.001 of PyTorch's result; 1e-06 is allowed"
    np.save(bundle / "sample" / "expected.npy", expected[:, :2])
    assert dict(failures(bundle))["toy.onnx"].startswith("computes the sample to inf")


def test_a_file_that_does_not_load(bundle):
    (bundle / "toy.onnx").write_bytes(b"no model")
    assert "cannot load" in [finding for file, finding in failures(bundle) if file == "toy.onnx"][1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda card: card.update(format=2), r"has format 2; this version reads 1"),
        (lambda card: card.pop("files"), r"is damaged: KeyError 'files'"),
        (lambda card: card.update(variants=3), r"is damaged: TypeError"),
        (lambda card: card.update(files=[1]), r"is damaged: AttributeError"),
        (lambda card: card["files"].update(x={"sha256": 3}), r"is damaged: TypeError"),
        (lambda card: card["variants"][0].update(allowed="much"), r"is damaged: TypeError"),
        (lambda card: card["variants"][0].update(allowed=float("nan")), r"is damaged: ValueError"),
        (lambda card: card["files"].update({"../x": {"sha256": ""}}), r"names a file outside of the bundle: \.\./x"),
        (lambda card: card["sample"].update(images=["/etc/x"]), r"names a file outside of the bundle: /etc/x"),
    ],
)
def test_damaged_cards(bundle, change, told):
    edit(bundle, change)
    with pytest.raises(RunError, match=told):
        verify(bundle)


def test_no_bundle(bundle, tmp_path):
    with pytest.raises(RunError, match=r"is not a bundle: it contains no card\.json"):
        verify(tmp_path)
    (bundle / "card.json").write_text("{")
    with pytest.raises(RunError, match=r"Cannot read .*card\.json"):
        verify(bundle)


def test_the_error_is_that_of_nearly_all_values():
    expected = np.zeros(2000, np.float32)
    assert sample_error(expected + np.float32(0.5), expected) == 0.5
    few, many = expected.copy(), expected.copy()
    few[:1], many[:4] = 9, 9
    assert (sample_error(few, expected), sample_error(many, expected)) == (0, 9)
    unknown = expected.copy()
    unknown[:4] = np.nan
    assert sample_error(unknown, unknown) == 0
    assert sample_error(unknown, expected) == np.inf
    assert sample_error(expected[:3], expected) == np.inf
