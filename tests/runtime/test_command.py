"""The command: results of each task, one line for a mistake, nothing half-written."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from visionattn_runtime import load
from visionattn_runtime.command import main


@pytest.fixture
def place(files, photo, tmp_path, monkeypatch):
    """A folder with a photograph, two views of the size that the stereo toy takes, and the files."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(photo[:24, :32]).save("left.png")
    Image.fromarray(photo[:24, 3:35]).save("right.png")
    (tmp_path / "taken.png").write_text("mine")
    for path in files.values():
        if path.exists():
            (tmp_path / path.name).symlink_to(path)
    for half in ("tower", "head"):
        (tmp_path / f"Pair.{half}.onnx").symlink_to(files["Pair"].with_suffix(f".{half}.onnx"))
    return tmp_path


def run(line):
    return main(shlex.split(line))


def test_classes(place, capsys, photo):
    assert run("Labelled.onnx photo.png left.png --top 2 --output classes.json") == 0
    printed = capsys.readouterr().out.splitlines()
    (name, probability), _ = load("Labelled.onnx").classify("photo.png", top=2)[0]
    assert printed[0].startswith(f"photo.png: {name} {probability:.1%}, ")
    assert json.loads((place / "classes.json").read_text())["photo.png"][0] == [name, probability]
    assert run("Labelled.onnx photo.png --output classes.npy") == 0
    np.testing.assert_array_equal(np.load("classes.npy"), load("Labelled.onnx").probabilities(photo))


def test_arrays(place):
    assert run("Features.onnx photo.png --output f.npy") == 0
    assert np.load("f.npy").shape == (1, 5)
    assert run("Pair.onnx photo.png left.png --output e.npy") == 0
    np.testing.assert_array_equal(np.load("e.npy"), load("Pair.onnx").embed("photo.png", "left.png"))
    assert run("Flow.onnx left.png right.png --output flow.npy --threads 1") == 0
    assert np.load("flow.npy").shape == (24, 32, 2)


def test_pictures(place):
    assert run("Enlarger.onnx photo.png --output large.png --tile 20") == 0
    np.testing.assert_array_equal(np.asarray(Image.open("large.png")), load("Enlarger.onnx").upscale("photo.png"))
    assert run("Stereo.onnx left.png right.png --output disparity.png") == 0
    disparity = load("Stereo.onnx").stereo("left.png", "right.png")
    found = np.asarray(Image.open("disparity.png")) / 256
    np.testing.assert_allclose(found, np.nan_to_num(disparity), atol=1 / 512)
    assert run("Stereo.onnx left.png right.png --output disparity.npy") == 0
    np.testing.assert_array_equal(np.load("disparity.npy"), disparity)


def test_overwriting(place):
    assert run("Enlarger.onnx photo.png --output taken.png --overwrite") == 0
    assert Image.open("taken.png").size == (100, 72)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", r"Give a model and an image, or --verify FOLDER"),
        ("absent.onnx photo.png --output a.png", r"There is no file absent.onnx"),
        ("photo.png photo.png --output a.png", r"cannot load photo.png"),
        ("Enlarger.onnx --output a.png", "No image was given"),
        ("Enlarger.onnx photo.png", "Give an output file: --output F.png"),
        ("Features.onnx photo.png", "Give an output file: --output F.npy"),
        ("Enlarger.onnx photo.png --output a.xyz", "must end in .png or .jpg or .webp"),
        ("Enlarger.onnx photo.png --output taken.png", "taken.png exists. Give --overwrite"),
        ("Enlarger.onnx photo.png --output .", "must end in .png"),
        ("Enlarger.onnx photo.png left.png --output a.png", "requires 1 image; got 2"),
        ("Enlarger.onnx taken.png --output a.png", "Cannot read the image taken.png"),
        ("Enlarger.onnx photo.png --output absent/a.png", "No such file or directory"),
        ("Stereo.onnx left.png photo.png --output a.npy", "got 24 x 32 and 36 x 50"),
        ("--verify .", "is not a bundle"),
    ],
)
def test_mistakes_are_told_in_one_line(place, capsys, line, told):
    before = sorted(path.name for path in place.iterdir())
    assert run(line) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("visionattn_runtime: ")
    assert told in printed
    assert sorted(path.name for path in place.iterdir()) == before
