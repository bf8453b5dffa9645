"""The tour, shortened: what it leaves behind is what its README says."""

import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import visionattn
from visionattn import quickstart
from visionattn.errors import InputError, StorageError
from visionattn.export import OnnxModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from visionattn.data.classify import datamodule
    from visionattn.quickstart import classify

    load = datamodule.load_digits
    patch = pytest.MonkeyPatch()
    patch.setattr(classify, "EPOCHS", 2)
    patch.setattr(datamodule, "load_digits", lambda split: [part[:360] for part in load(split)])
    folder = tmp_path_factory.mktemp("tour")
    console = Console(record=True, width=160)
    quickstart.run(folder, ["classify"], console)
    patch.undo()
    (folder / "told.txt").write_text(console.export_text())
    return folder


def test_every_file_of_the_readme_is_there(folder):
    station = folder / "classify"
    readme = (station / "README.md").read_text()
    for name in re.findall(r"`([\w/]+\.?\w*)`", readme.split("Digits")[0].split("| --- |")[1]):
        assert (station / name).exists(), name
    assert sorted(path.name for path in station.iterdir() if path.suffix == ".ckpt") == [
        "baseline.ckpt",
        "minimum.ckpt",
    ]


def test_the_onnx_file_is_the_checkpoint(folder):
    station = folder / "classify"
    path = next(station.glob("*.onnx"))
    images = np.random.default_rng(0).normal(size=(3, 1, 28, 28)).astype(np.float32)
    import torch

    expected = visionattn.load(station / f"{path.stem}.ckpt")(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(OnnxModel(path)(images)[0], expected, rtol=1e-4, atol=1e-5)


def test_table_and_picture(folder):
    told = (folder / "told.txt").read_text()
    for word in ("baseline", "minimum", "305,034", "30,858", "test digits correctly"):
        assert word in told
    picture = np.asarray(Image.open(folder / "classify" / "predictions.png"))
    assert picture.std() > 20


def test_stations_are_found():
    assert quickstart.stations()[0] == "classify"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    photo = tmp_path / "classify" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"mine")
    with pytest.raises(InputError, match="contains other files"):
        quickstart.run(tmp_path, ["classify"], Console())
    assert photo.read_bytes() == b"mine"


def test_an_earlier_tour_is_cleared(tmp_path):
    quickstart._empty(tmp_path / "station")
    (tmp_path / "station" / "old.onnx").write_bytes(b"")
    quickstart._empty(tmp_path / "station")
    assert [path.name for path in (tmp_path / "station").iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", ["file", "file/sub", "n" * 300, "n\0ul", "/proc/tour"])
def test_a_folder_that_cannot_be_made_is_named_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"Cannot write to the folder .*\. Give another folder with --output"):
        quickstart.run(tmp_path / name, ["classify"], Console())
    assert (tmp_path / "file").read_text() == "mine"
